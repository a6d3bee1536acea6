"""M-RoPE positions equal transformers' get_rope_index for every mix of text and images."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2VLModel

from lm_service.engine.types import ImageSpan
from lm_service.positions import mrope_positions
from lookonce.core.identity import EmbeddingReference

MERGE = 2
grids = st.tuples(
    st.integers(1, 3), st.integers(1, 9).map(lambda n: n * MERGE), st.integers(1, 9).map(lambda n: n * MERGE)
)


def theirs(token_types, images):
    """transformers' own, which wants nothing of the model but its config and a sister method."""
    model = SimpleNamespace(config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=MERGE)))
    model.get_vision_position_ids = Qwen2VLModel.get_vision_position_ids.__get__(model)
    ids = torch.zeros(1, len(token_types), dtype=torch.long)
    grid = torch.tensor([image.reference.grid_thw for image in images]) if images else None
    return Qwen2VLModel.get_rope_index(model, ids, torch.tensor([token_types]), image_grid_thw=grid)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 12), st.lists(st.tuples(grids, st.integers(1, 12)), max_size=4))
def test_positions_equal_transformers(leading, pictures):
    types, images = [0] * leading, []
    for grid, trailing in pictures:
        t, h, w = grid
        reference = EmbeddingReference(b"", "", b"", grid, t * h * w // MERGE**2, 1, 1)
        images.append(ImageSpan(len(types), reference))
        types += [1] * reference.tokens + [0] * trailing
    positions, following = mrope_positions(len(types), images, MERGE)
    expected, delta = theirs(types, images)
    assert positions.dtype == torch.int64
    assert torch.equal(positions, expected[:, 0])
    assert following == len(types) + int(delta)


def test_an_image_may_begin_and_end_a_prompt():
    reference = EmbeddingReference(b"", "", b"", (1, 4, 6), 6, 1, 1)
    positions, following = mrope_positions(6, [ImageSpan(0, reference)], MERGE)
    assert positions.tolist() == [[0] * 6, [0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2]]
    assert following == 3
