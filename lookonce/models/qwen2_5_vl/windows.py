"""The windows of an image's tokens: patches attend within them, so a window's lie together while a tower runs.

Only which tokens share a window matters, not the order of windows: here those of equal size follow each other, so that
they can attend in one operation. At the right and at the bottom windows are smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Windows:
    """Those of a grid of tokens."""

    order: NDArray[np.int64]  # [tokens]: the number, row by row, of each token when windows lie together
    back: NDArray[np.int64]  # [tokens]: where each token, row by row, lies then
    counts: tuple[int, ...]  # tokens of each window, in order


@lru_cache(maxsize=64)
def windows_of(rows: int, columns: int, side: int) -> Windows:
    """Windows of `side` x `side` tokens, from the upper left corner on. Treat the arrays as read-only."""
    row, column = np.divmod(np.arange(rows * columns), columns)
    down, across = row // side, column // side
    size = np.minimum(side, rows - down * side) * np.minimum(side, columns - across * side)
    order = np.lexsort((column, row, across, down, -size))
    window = (down * columns + across)[order]
    begins = np.flatnonzero(np.diff(window, prepend=-1))
    return Windows(order, np.argsort(order), tuple(size[order][begins].tolist()))
