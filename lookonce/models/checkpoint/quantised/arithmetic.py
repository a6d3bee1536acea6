"""Integers out of 32-bit words, and scales spread over the values they are of. Imports torch."""

from __future__ import annotations

import math

import torch

WORD = 32


def unpacked(words: torch.Tensor, bits: int, axis: int) -> torch.Tensor:
    """Int32 words along `axis` (0 or 1) to the unsigned integers of `bits` that they hold, the lowest bits first.

    Where bits don't divide 32, an integer may begin in one word and end in the next one, and a last word that is not
    filled gives what bits are left of it.
    """
    fields = _straddling(words, bits, axis) if WORD % bits else _aligned(words, bits, axis)
    return fields.reshape(-1, words.shape[1]) if axis == 0 else fields.reshape(words.shape[0], -1)


def _aligned(words: torch.Tensor, bits: int, axis: int) -> torch.Tensor:
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32)
    shifts = shifts[:, None] if axis == 0 else shifts
    return (words.unsqueeze(axis + 1) >> shifts).bitwise_and_((1 << bits) - 1)


def _straddling(words: torch.Tensor, bits: int, axis: int) -> torch.Tensor:
    missing = -words.shape[axis] % bits
    if missing:  # to whole runs of `bits` words, which hold 32 integers
        words = torch.nn.functional.pad(words, (0, 0, 0, missing) if axis == 0 else (0, missing))
    rows, columns = words.shape
    runs = words.reshape(-1, bits, columns) if axis == 0 else words.reshape(rows, -1, bits)
    found = []
    for begin in range(0, WORD * bits, bits):
        word, at = divmod(begin, WORD)
        here = min(bits, WORD - at)  # bits in this word
        field = (runs.select(axis + 1, word) >> at).bitwise_and_((1 << here) - 1)
        if here < bits:
            rest = runs.select(axis + 1, word + 1).bitwise_and((1 << bits - here) - 1)
            field |= rest << here
        found.append(field)
    return torch.stack(found, axis + 1)


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
    grid = scale_values(values).reshape(rows, columns)
    if rows > 1:
        grid = grid.index_select(0, torch.arange(start, stop) // block[0])
    if columns > 1:
        grid = grid.index_select(1, torch.arange(shape[1]) // block[1])
    return grid


def scale_values(stored: torch.Tensor) -> torch.Tensor:
    """Scales in float32; bytes are exponents of two (E8M0 of OCP MX, 1.0)."""
    return (stored.view(torch.float8_e8m0fnu) if stored.dtype is torch.uint8 else stored).float()
