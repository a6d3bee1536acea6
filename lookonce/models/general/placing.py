"""A text model of transformers with its layers on several devices: what flows through it moves along.

Each layer, and each module beside them, is given its arguments on the device of its own weights. What several layers of
one device are given alike, such as the cosines and sines of positions, is moved once a forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree

Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[Any, Any]]


def bring_together(decoder: Any, head: nn.Module, devices: Sequence[torch.device]) -> None:
    """Bring the buffers of a text model whose weights are placed to where they are used, and have arguments follow.

    `devices` are those of the layers, in order; modules without weights are on the first one.
    """
    parts = [child for child in decoder.children() if child is not decoder.layers]
    homes = {id(layer): device for layer, device in zip(decoder.layers, devices, strict=True)}
    for part in (*parts, head):
        homes[id(part)] = next((weight.device for weight in part.parameters()), devices[0])
    placed = [*parts, *decoder.layers, head]
    for part in placed:
        part.to(homes[id(part)])
    if len({homes[id(part)] for part in placed}) == 1:
        return
    moved = _Moved()
    decoder.register_forward_pre_hook(moved.forget)
    for part in placed:
        part.register_forward_pre_hook(moved.to(homes[id(part)]), with_kwargs=True)


class _Moved:
    """What was moved in one forward, so that it is moved to a device once."""

    def __init__(self) -> None:
        self._copies: dict[tuple[int, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}

    def forget(self, *_: Any) -> None:
        """A forward begins."""
        self._copies.clear()

    def to(self, device: torch.device) -> Hook:
        """A hook that moves a module's arguments there."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            found: tuple[Any, Any] = _pytree.tree_map_only(torch.Tensor, lambda x: self._on(device, x), (args, kwargs))
            return found

        return hook

    def _on(self, device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device == device:
            return tensor
        key = id(tensor), device  # the tensor is kept beside its copy, so that no other one gets its id
        if key not in self._copies:
            self._copies[key] = tensor, tensor.to(device)
        return self._copies[key][1]
