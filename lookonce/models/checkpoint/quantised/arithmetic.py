"""Integers out of 32-bit words, and scales spread over the values they are of. Imports torch."""

from __future__ import annotations

import math

import torch

WORD = 32


def unpacked(words: torch.Tensor, bits: int, axis: int) -> torch.Tensor:
    """Int32 words along `axis` (0 or 1) to the unsigned integers of `bits` that they hold, the lowest bits first."""
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32)
    if axis == 0:
        fields = words.unsqueeze(1) >> shifts[None, :, None]
        return fields.bitwise_and_((1 << bits) - 1).reshape(-1, words.shape[1])
    fields = words.unsqueeze(2) >> shifts
    return fields.bitwise_and_((1 << bits) - 1).reshape(words.shape[0], -1)


def groups_of(index: torch.Tensor | None, inputs: int, groups: int, size: int) -> torch.Tensor:
    """Int64 [inputs]: the group of each input, as stored or `size` inputs a group. ValueError for one there isn't."""
    found = torch.arange(inputs) // size if index is None else index.long()
    if inputs and not 0 <= int(found.min()) <= int(found.max()) < groups:
        raise ValueError(f"numbers groups up to {int(found.max())}, and has scales of {groups}")
    return found


def grid_rows(
    values: torch.Tensor, start: int, stop: int, shape: tuple[int, int], block: tuple[int, int]
) -> torch.Tensor:
    """Float32, to be broadcast over rows `start` to `stop` of a matrix of `shape` whose every `block` has one value."""
    rows, columns = (math.ceil(side / step) for side, step in zip(shape, block, strict=True))
    grid = values.reshape(rows, columns).float()
    if rows > 1:
        grid = grid.index_select(0, torch.arange(start, stop) // block[0])
    if columns > 1:
        grid = grid.index_select(1, torch.arange(shape[1]) // block[1])
    return grid
