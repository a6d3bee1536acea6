"""One sequence without an engine: an `Attend` and a `Recur` over parts of it that are computed one after the other."""

from __future__ import annotations

import torch
from torch.nn import functional

from lookonce.models.text_adapter import ModelShape, Runs


class OneSequence:
    """Keeps keys, values and states from part to part."""

    calls = None

    def __init__(self, shape: ModelShape) -> None:
        self._past: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by layer: keys and values
        self._states = [torch.zeros(1, *x.shape, dtype=x.dtype, device=shape.device) for x in shape.states]
        self.groups: list[Runs] = []

    def begin(self, tokens: int) -> None:
        """A part of so many tokens is computed next."""
        device = self._states[0].device if self._states else None
        everything = torch.arange(tokens, device=device)[None]
        self.groups = [Runs(everything, torch.tensor([tokens], device=device), None)]

    def before(self, number: int, runs: Runs) -> torch.Tensor:
        return self._states[number]

    def keep(self, number: int, runs: Runs, states: torch.Tensor) -> None:
        self._states[number] = states

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See `Attend`: plain causal attention."""
        before = self._past.get(layer)
        if before is not None:
            k, v = torch.cat([before[0], k]), torch.cat([before[1], v])
        self._past[layer] = k, v
        group, count = q.shape[1] // k.shape[1], len(k)
        k, v = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
        places = torch.arange(count, device=q.device)
        seen = places <= places[count - len(q) :, None]
        return functional.scaled_dot_product_attention(q.transpose(0, 1), k, v, seen).transpose(0, 1).flatten(1)
