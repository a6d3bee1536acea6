"""M-RoPE positions of a prompt (Qwen2-VL, arXiv:2409.12191, section 2.1), computed from its layout alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lm_service.engine.types import ImageSpan


def mrope_positions(length: int, images: Sequence[ImageSpan], merge_size: int) -> tuple[torch.Tensor, int]:
    """Positions int64 [3, length] (temporal, height, width) and the position of the first generated token.

    Text counts up by one on all three rows. An image's tokens get frame, row and column of their cell, counted from the
    position it starts at; what follows goes on after its longer side. `images` come in order and don't overlap.
    """
    pieces: list[torch.Tensor] = []
    at = position = 0
    for span in images:
        pieces.append(_text(position, span.start - at))
        position += span.start - at
        t, h, w = span.reference.grid_thw
        rows, columns = h // merge_size, w // merge_size
        pieces.append(_cells(t, rows, columns) + position)
        position += max(rows, columns)
        at = span.end
    pieces.append(_text(position, length - at))
    positions = torch.cat(pieces, dim=1)
    return positions, int(positions.max()) + 1 if length else 0


def _text(start: int, count: int) -> torch.Tensor:
    return torch.arange(start, start + count).expand(3, count)


def _cells(frames: int, rows: int, columns: int) -> torch.Tensor:
    """[3, frames*rows*columns], in the order of the encoder's output: by frame, row, column."""
    grids = torch.meshgrid(torch.arange(frames), torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([grid.flatten() for grid in grids])
