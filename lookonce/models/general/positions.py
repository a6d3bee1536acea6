"""M-RoPE positions by the class's own `get_rope_index`, which needs its settings and no weight."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lookonce.models.family import Grid

_ASKED = {"input_ids", "mm_token_type_ids", "image_grid_thw"}
Run = tuple[int, int]
"""An image's first token in a prompt, and how many they are."""


def position_rows(model: Any) -> int:
    """3 for a class that lays out images along three axes, else 1."""
    index = getattr(model.base_model, "get_rope_index", None)
    return 3 if index is not None and set(inspect.signature(index).parameters) >= _ASKED else 1


def rope_positions(model: Any, length: int, images: Sequence[tuple[Run, Grid]]) -> NDArray[np.int64]:
    """[3, length] of a prompt with images of these grids, as the checkpoint's image processor counts them."""
    types = image_types(length, [run for run, _ in images])
    grids = torch.tensor([grid for _, grid in images], dtype=torch.int64).view(-1, 3) if images else None
    ids = torch.zeros(1, length, dtype=torch.int64)
    found, _ = model.base_model.get_rope_index(ids, mm_token_type_ids=types, image_grid_thw=grids)
    positions: NDArray[np.int64] = found[:, 0].numpy()
    return positions


def image_types(length: int, runs: Sequence[Run]) -> torch.Tensor:
    """int64 [1, length]: 1 for tokens of images, else 0."""
    types = torch.zeros(1, length, dtype=torch.int64)
    for start, count in runs:
        types[0, start : start + count] = 1
    return types
