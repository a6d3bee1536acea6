"""M-RoPE positions equal transformers' get_rope_index for every mix of text and images."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2VLModel

from lookonce.models.qwen2_vl.config import mrope_positions

MERGE = 2
grids = st.tuples(
    st.integers(1, 3), st.integers(1, 9).map(lambda n: n * MERGE), st.integers(1, 9).map(lambda n: n * MERGE)
)


def theirs(token_types, images):
    """transformers' own, which wants nothing of the model but its config and a sister method."""
    model = SimpleNamespace(config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=MERGE)))
    model.get_vision_position_ids = Qwen2VLModel.get_vision_position_ids.__get__(model)
    ids = torch.zeros(1, len(token_types), dtype=torch.long)
    grid = torch.tensor([grid for _, grid in images]) if images else None
    return Qwen2VLModel.get_rope_index(model, ids, torch.tensor([token_types]), image_grid_thw=grid)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 12), st.lists(st.tuples(grids, st.integers(1, 12)), max_size=4))
def test_positions_equal_transformers(leading, grids_and_text):
    types, images = [0] * leading, []
    for grid, trailing in grids_and_text:
        t, h, w = grid
        images.append((len(types), grid))
        types += [1] * (t * h * w // MERGE**2) + [0] * trailing
    positions, following = mrope_positions(len(types), images, MERGE)
    expected, delta = theirs(types, images)
    assert positions.dtype == np.int64
    assert np.array_equal(positions, expected[:, 0].numpy())
    assert following == len(types) + int(delta)


def test_an_image_may_begin_and_end_a_prompt():
    positions, following = mrope_positions(6, [(0, (1, 4, 6))], MERGE)
    assert positions.tolist() == [[0] * 6, [0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2]]
    assert following == 3
