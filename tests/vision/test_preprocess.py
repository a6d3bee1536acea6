"""Preprocessing equals transformers' Pillow processor of Qwen2-VL, bit for bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as library_resize

from lookonce.core.errors import CheckpointError
from lookonce.models.checkpoint import Half, open_checkpoint
from lookonce.models.qwen2_vl.config import smart_resize
from lookonce.models.qwen2_vl.preprocessing import Preprocessor

SIZES = [(29, 31), (56, 56), (1000, 57), (57, 1000), (8, 8), (1600, 8), (449, 337), (1280, 720)]
BOUNDS = [(56 * 56, 28 * 28 * 1280), (4 * 784, 16 * 784), (784, 784), (256 * 784, 512 * 784)]


@pytest.fixture(scope="module")
def preprocessor_settings(checkpoint_path):
    return open_checkpoint(str(checkpoint_path), needs=Half.VISION).preprocessor


def same(settings, image, bounds, **changes):
    ours = Preprocessor(settings | changes)
    patches = ours(image, *bounds)
    library = Qwen2VLImageProcessorPil(**changes)
    size = {"shortest_edge": bounds[0], "longest_edge": bounds[1]}
    expected = library(images=[image], size=size, return_tensors="np")
    assert tuple(expected["image_grid_thw"][0]) == patches.grid_thw
    assert expected["pixel_values"].dtype == np.float32
    return np.array_equal(ours.pixel_values(patches), expected["pixel_values"])


@pytest.mark.parametrize("bounds", BOUNDS)
def test_photographs(preprocessor_settings, photographs, bounds):
    for image in photographs:
        assert same(preprocessor_settings, image, bounds)


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize(
    "size", [(29, 31), (56, 56), (1000, 57), (57, 1000), (8, 8), (1600, 8), (449, 337), (1920, 1080)]
)
def test_odd_sizes(preprocessor_settings, noise, size, bounds):
    assert same(preprocessor_settings, noise(*size), bounds)


@pytest.mark.parametrize(
    "changes",
    [
        {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]},
        {"do_normalize": False},
        {"do_rescale": False},
        {"rescale_factor": 1 / 127.5},
        {"resample": 2},
    ],
)
def test_settings_of_the_checkpoint_are_followed(preprocessor_settings, noise, changes):
    assert same(preprocessor_settings, noise(100, 75), BOUNDS[0], **changes)


@settings(max_examples=300, deadline=None)
@given(
    st.integers(8, 8000),
    st.integers(8, 8000),
    st.integers(1, 2_000_000),
    st.integers(784, 13_000_000),
)
def test_smart_resize_is_the_library_s(height, width, least, most):
    if max(height, width) > 200 * min(height, width):
        return
    arguments = {"factor": 28, "min_pixels": min(least, most), "max_pixels": most}
    assert smart_resize(height, width, **arguments) == library_resize(height, width, **arguments)


@settings(max_examples=300, deadline=None)
@given(st.integers(8, 2000), st.integers(8, 2000), st.integers(784, 2_000_000))
def test_a_min_is_passed_by_less_than_a_row_and_a_column(height, width, bound):
    """Also where it is the max too."""
    rows, columns = smart_resize(height, width, factor=28, min_pixels=bound, max_pixels=bound)
    if round(height / 28) * round(width / 28) * 28**2 < bound:
        scale = math.sqrt(bound / (height * width))
        assert bound <= rows * columns < bound + 28 * (height + width) * scale + 28**2


def test_a_min_close_to_the_max_may_end_above_it():
    assert smart_resize(100, 90, factor=28, min_pixels=20 * 784, max_pixels=20 * 784) == (140, 140)


def test_a_processor_without_resizing_is_refused(preprocessor_settings):
    with pytest.raises(CheckpointError, match="do_resize"):
        Preprocessor(preprocessor_settings | {"do_resize": False})
