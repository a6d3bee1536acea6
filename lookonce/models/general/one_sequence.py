"""One sequence without an engine: an `Attend` and a `Recur` over its parts, computed plainly one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from lookonce.models.general.blocks import visible
from lookonce.models.general.positions import Run
from lookonce.models.text_adapter import AttentionRules, ModelShape, Runs


class OneSequence:
    """Attends by the rules of its model, and keeps keys, values and states from part to part."""

    calls = None

    def __init__(self, shape: ModelShape, blocks: Sequence[Run], length: int, window: int | None) -> None:
        """Of so many tokens, of which those of `blocks` see one another both ways; `window` stands for those of the
        model."""
        rules = shape.rules or AttentionRules((None,) * shape.layers)
        self._softcap, self._device = rules.softcap, shape.device
        seen = {
            wanted: visible(length, wanted, blocks, within_window=rules.within_window).to(self._device)
            for wanted in (None, window)
        }
        self._seen = [seen[None if each is None else window] for each in rules.windows]
        self._past: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by layer: keys and values
        self._states = [torch.zeros(1, *x.shape, dtype=x.dtype, device=self._device) for x in shape.states]
        self.groups: list[Runs] = []

    def begin(self, tokens: int) -> None:
        """A part of so many tokens is computed next."""
        everything = torch.arange(tokens, device=self._device)[None]
        self.groups = [Runs(everything, torch.tensor([tokens], device=self._device), None)]

    def before(self, number: int, runs: Runs) -> torch.Tensor:
        return self._states[number]

    def keep(self, number: int, runs: Runs, states: torch.Tensor) -> None:
        self._states[number] = states

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if layer in self._past:
            k, v = (torch.cat([old, new]) for old, new in zip(self._past[layer], (k, v), strict=True))
        self._past[layer] = k, v
        seen = self._seen[layer][len(k) - len(q) : len(k), : len(k)].to(q.device)
        group = q.shape[1] // k.shape[1]
        q, k, v = q.transpose(0, 1), *(x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
        if self._softcap is None:
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(0, 1).flatten(1)
        scores = torch.matmul(q, k.transpose(1, 2)) * q.shape[-1] ** -0.5
        scores = (self._softcap * torch.tanh(scores / self._softcap)).masked_fill(~seen, -torch.inf)
        return torch.matmul(scores.float().softmax(-1).to(q.dtype), v).transpose(0, 1).flatten(1)
