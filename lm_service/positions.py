"""M-RoPE positions of a prompt (Qwen2-VL, arXiv:2409.12191, section 2.1), computed from its layout alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lm_service.engine.types import ImageSpan


def mrope_positions(length: int, images: Sequence[ImageSpan], merge_size: int) -> tuple[torch.Tensor, int]:
    """Positions int64 [3, length] (temporal, height, width) and the position of the first generated token.

    Text counts up by one on all three rows. An image's tokens get frame, row and column of their cell, counted from the
    position it starts at; what follows goes on after its longer side. `images` come in order and don't overlap.
    """
    positions = np.empty((3, length), dtype=np.int64)
    at = position = 0
    for span in images:
        positions[:, at : span.start] = np.arange(position, position + span.start - at)
        position += span.start - at
        t, h, w = span.reference.grid_thw
        rows, columns = h // merge_size, w // merge_size
        cells = positions[:, span.start : span.end].reshape(3, t, rows, columns)
        # by frame, row, column: the order of the encoder's output
        cells[0] = np.arange(position, position + t)[:, None, None]
        cells[1] = np.arange(position, position + rows)[:, None]
        cells[2] = np.arange(position, position + columns)
        position += max(rows, columns)
        at = span.end
    positions[:, at:] = np.arange(position, position + length - at)
    return torch.from_numpy(positions), int(positions.max()) + 1 if length else 0
