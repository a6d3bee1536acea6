"""Matrices stored as one number a value, 8 bits wide, beside scales of blocks of them. No torch until rows are made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lookonce.models.checkpoint.headers import TensorEntry

if TYPE_CHECKING:
    import torch

Block = tuple[int, int]


@dataclass(frozen=True)
class ScaledMatrix:
    """See `Matrix`: a value is scale * (q - zero)."""

    shape: tuple[int, int]
    label: str
    block: Block  # rows and columns that share a scale
    scale: str  # ending of the scales' tensor
    zero: str | None = None  # and of the zeros'

    def rows(self, parts: Mapping[str, torch.Tensor], start: int, stop: int) -> torch.Tensor:
        from lookonce.models.checkpoint.quantised.arithmetic import grid_rows

        values = parts["weight"][start:stop].float()
        if self.zero is not None:
            values -= grid_rows(parts[self.zero], start, stop, self.shape, self.block)
        return values.mul_(grid_rows(parts[self.scale], start, stop, self.shape, self.block))


def block_of(scale: TensorEntry, shape: tuple[int, int], blocks: Iterable[Block]) -> Block:
    """Which part of a matrix each scale is of: all of it, a row, or one of the `blocks` that its settings name.

    ValueError when none of these has so many."""
    outputs, inputs = shape
    if math.prod(scale.shape) == 1:
        return shape
    if scale.shape in ((outputs,), (outputs, 1)):
        return 1, inputs
    for rows, columns in blocks:
        if scale.shape == (math.ceil(outputs / rows), math.ceil(inputs / columns)):
            return rows, columns
    raise ValueError(f"of shape {list(shape)} has scales of shape {list(scale.shape)}")
