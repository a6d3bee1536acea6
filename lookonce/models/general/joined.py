"""Tensors that a class has joined and files have in parts: the matrices of experts, or of queries, keys and values.

What is joined how is transformers' own conversion mapping. Run backwards over a class on the meta device it says which
parts there are and what shapes they have; a half is loaded in parts, and joined group by group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import WeightConverter, apply_converters

from lookonce.core.errors import CheckpointError


@dataclass(frozen=True)
class Group:
    """Parts that are joined together, by the class's names."""

    converter: WeightConverter
    parts: dict[str, tuple[int, ...]]  # shapes
    joined: tuple[str, ...]


def groups_of(model: Any, joins: Sequence[WeightConverter], state: Mapping[str, torch.Tensor]) -> list[Group]:
    """Those of a class, whose tensors `state` holds on the meta device. What can't be taken apart is in none."""
    ways = [(join.reverse_transform(), join) for join in reversed(joins)]
    found: dict[tuple[int, str], tuple[Any, WeightConverter, list[str]]] = {}
    for name, tensor in state.items():
        for at, (way, join) in enumerate(ways):
            renamed, pattern = way.rename_source_key(name)
            if pattern is not None:
                reverse, _, names = found.setdefault((at, renamed), (deepcopy(way), join, []))
                reverse.add_tensor(renamed, name, pattern, tensor)
                names.append(name)
                break
    groups = []
    for (_, renamed), (reverse, join, names) in found.items():
        try:
            made = reverse.convert(renamed, model=model, config=model.config)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, NotImplementedError):
            continue
        parts = {part: (x[0] if isinstance(x, list) else x) for part, x in made.items()}
        groups.append(Group(join, {part: tuple(x.shape) for part, x in parts.items()}, tuple(names)))
    return groups


def in_parts(groups: Sequence[Group], state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a class with those of the groups apart."""
    gone = {name for group in groups for name in group.joined}
    apart = {name: torch.empty(shape, device="meta") for group in groups for name, shape in group.parts.items()}
    return {name: x for name, x in state.items() if name not in gone} | apart


@contextmanager
def apart(model: Any, groups: Sequence[Group]) -> Iterator[None]:
    """Meanwhile a class on the meta device has parts as parameters, to be filled. Afterwards they are joined.

    Raises CheckpointError for parts that make another tensor than the class has."""
    shapes = {name: tuple(model.get_parameter(name).shape) for group in groups for name in group.joined}
    added: list[tuple[nn.Module, str]] = []
    for group in groups:
        for name in group.joined:
            owner, last = _owner(model, name)
            del owner._parameters[last]
        for name, shape in group.parts.items():
            added += _add(model, name, shape)
    yield
    for group in groups:
        whole = _joined(model, group)
        for name in group.parts:
            owner, last = _owner(model, name)
            del owner._parameters[last]
        for name, x in whole.items():
            if name not in shapes or tuple(x.shape) != shapes[name]:
                raise CheckpointError(f"parts of tensor {name!r} don't make what {type(model).__name__} has there")
            owner, last = _owner(model, name)
            owner.register_parameter(last, nn.Parameter(x, requires_grad=False))
    for owner, name in added:
        owner._modules.pop(name, None)


def _joined(model: Any, group: Group) -> dict[str, torch.Tensor]:
    running: Any = deepcopy(group.converter)
    first = ""
    for name in group.parts:
        renamed, pattern = apply_converters(name, [running])
        first = first or renamed
        running.add_tensor(renamed, name, pattern, model.get_parameter(name).detach())
    made = running.convert(first, model=model, config=model.config)
    return {name: x[0] if isinstance(x, list) else x for name, x in made.items()}


def _owner(model: Any, name: str) -> tuple[nn.Module, str]:
    parent, _, last = name.rpartition(".")
    return model.get_submodule(parent), last


def _add(model: nn.Module, name: str, shape: tuple[int, ...]) -> Iterator[tuple[nn.Module, str]]:
    """Where a module was added that leads to a parameter, if there was none."""
    *modules, last = name.split(".")
    owner, new = model, False
    for each in modules:
        if each not in owner._modules:
            owner._modules[each] = nn.Module()
            if not new:
                yield owner, each
            new = True
        following = owner._modules[each]
        if following is None:
            raise CheckpointError(f"{type(model).__name__} has no place for the parts of {name!r}")
        owner = following
    owner.register_parameter(last, nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False))
