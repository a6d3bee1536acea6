"""M-RoPE positions of a prompt (Qwen2-VL, arXiv:2409.12191, section 2.1), computed from its layout alone."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lookonce.models.family import Layout

_REMEMBERED, _REMEMBERED_LENGTH = 128, 2048
"""Layouts whose positions are kept, and the longest such: the same questions are asked about many images."""


def mrope_positions(length: int, images: Layout, merge_size: int) -> tuple[NDArray[np.int64], int]:
    """Positions [3, length] (temporal, height, width) and the position of the first generated token.

    Text counts up by one on all three rows. An image's tokens get frame, row and column of their cell, counted from the
    position it starts at; what follows goes on after its longer side. `images` come in order and don't overlap. Treat
    the result as read-only.
    """
    return (_remembered if length <= _REMEMBERED_LENGTH else _laid_out)(length, tuple(images), merge_size)


def _laid_out(length: int, images: Layout, merge_size: int) -> tuple[NDArray[np.int64], int]:
    positions = np.empty((3, length), dtype=np.int64)
    at = position = 0
    for start, (t, h, w) in images:
        positions[:, at:start] = np.arange(position, position + start - at)
        position += start - at
        rows, columns = h // merge_size, w // merge_size
        end = start + t * rows * columns
        cells = positions[:, start:end].reshape(3, t, rows, columns)
        # by frame, row, column: the order of the encoder's output
        cells[0] = np.arange(position, position + t)[:, None, None]
        cells[1] = np.arange(position, position + rows)[:, None]
        cells[2] = np.arange(position, position + columns)
        position += max(rows, columns)
        at = end
    positions[:, at:] = np.arange(position, position + length - at)
    return positions, int(positions.max()) + 1 if length else 0


_remembered = lru_cache(maxsize=_REMEMBERED)(_laid_out)
