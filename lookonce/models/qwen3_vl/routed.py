"""A mixture of experts behind a decoder layer's attention: a router sends each token to some SwiGLUs of many
(Qwen3, arXiv:2505.09388)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch

from lookonce.models.linear import GatedMlp, GatedUnit, Linear, Mlp, gated_unit, linear
from lookonce.models.qwen2_vl.text import Qwen2VLAdapter


@dataclass(frozen=True)
class RoutedMlp:
    """An `Mlp`. Tokens of one expert are computed together."""

    router: torch.Tensor  # [experts, hidden]
    experts: Sequence[GatedMlp]
    chosen: int  # experts of a token

    @property
    def matrices(self) -> tuple[Linear | GatedUnit, ...]:
        return (*chain.from_iterable(expert.matrices for expert in self.experts),)

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Experts' outputs in the proportions of their probabilities among those chosen."""
        odds = torch.nn.functional.linear(x, self.router).softmax(-1, dtype=torch.float32)
        shares, which = odds.topk(self.chosen, dim=-1)
        shares = (shares / shares.sum(-1, keepdim=True)).to(x.dtype).view(-1, 1)
        order = which.view(-1).argsort(stable=True)  # places [T * chosen], those of an expert together
        counts = which.view(-1).bincount(minlength=len(self.experts)).tolist()
        rows, made = x.index_select(0, order // self.chosen), x.new_empty(len(order), x.shape[1])
        parts = zip(self.experts, torch.split(order, counts), torch.split(rows, counts), strict=True)
        for expert, place, own in parts:
            if len(own):
                made[place] = expert.down(expert.gate_up(own))
        return residual + (made * shares).view(len(x), self.chosen, x.shape[1]).sum(1)


def routed_mlp(module: Any, device: torch.device, quantization: str, *, native: bool) -> Mlp:
    """Of a `modules.RoutedTextMlp`, which loses its weights. Each expert's matrices are laid out, or quantised, as a
    dense layer's are."""
    stacks = [getattr(module.experts, name).data.to(device) for name in ("gate_up_proj", "down_proj")]
    module.experts = None
    unit = partial(gated_unit, quantization=quantization, native=native)
    matrix = partial(linear, quantization=quantization, native=native)
    experts = [GatedMlp(unit(*both.chunk(2)), matrix([down])) for both, down in zip(*stacks, strict=True)]
    return RoutedMlp(module.gate.weight.data.to(device), experts, module.chosen)


class RoutedAdapter(Qwen2VLAdapter):
    """Over a `modules.RoutedTextModel`."""

    make_mlp = staticmethod(routed_mlp)
