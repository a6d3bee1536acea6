"""Keys and values of neighbouring tokens in all layers, those of each device in one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch

from lookonce.models.text_adapter import ModelShape


class KV:
    """`parts`: one [layers of the stage, 2, kv_heads, T, d] for each stage of the model, on the stage's device."""

    def __init__(self, parts: Sequence[torch.Tensor] = ()) -> None:
        self.parts = tuple(parts)

    @classmethod
    def empty(cls, shape: ModelShape, tokens: int) -> KV:
        """Room for so many tokens, not yet written."""
        return cls(
            [
                torch.empty(
                    (stage.layers, 2, shape.kv_heads, tokens, shape.head_dim), dtype=shape.dtype, device=stage.device
                )
                for stage in shape.stages
            ]
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts)

    def cut(self, start: int, end: int | None = None) -> KV:
        """A view of the tokens [start, end)."""
        return KV([part[..., start:end, :] for part in self.parts])

    def copy_(self, other: KV) -> None:
        """Take over the numbers of as many tokens."""
        for mine, theirs in zip(self.parts, other.parts, strict=True):
            mine.copy_(theirs)

    def clone(self) -> KV:
        """The same in memory of its own."""
        return KV([part.clone() for part in self.parts])

    def zero_(self) -> None:
        """Make all numbers zero."""
        for part in self.parts:
            part.zero_()

    def is_finite(self) -> bool:
        """Whether all numbers are finite."""
        return all(bool(part.isfinite().all()) for part in self.parts)

    @cached_property
    def layers(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values [kv_heads, T, d] of each layer, views. Compiled kernels do without: they want addresses."""
        return [(layer[0], layer[1]) for part in self.parts for layer in part.unbind(0)]
