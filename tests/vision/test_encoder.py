"""The packed forward: a row of a batch equals the row alone, and both equal transformers' own tower."""

from __future__ import annotations

import pytest
import torch

from lookonce.models.checkpoint import Half, open_checkpoint
from lookonce.models.qwen2_vl.preprocessing import Preprocessor
from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from lookonce.models.qwen2_vl.vision import Encoder
from tests.modules import load_vision_tower

SIZES = [(57, 200), (56, 56), (300, 200), (29, 31), (200, 300), (56, 57)]


CASES = [("tiny", True), ("tiny", False), ("small", True)]


@pytest.fixture(scope="module", params=CASES, ids=str)
def encoder(request, tmp_path_factory):
    """With compiled kernels and without."""
    size, native = request.param
    path = make_random_checkpoint(tmp_path_factory.mktemp("encoder") / size, size=size)
    checkpoint = open_checkpoint(str(path), needs=Half.VISION)
    encoder = Encoder.load(checkpoint, torch.float32, torch.device("cpu"), native=native)
    assert encoder.native == native
    encoder.preprocess = Preprocessor(checkpoint.preprocessor)
    encoder.library_tower = load_vision_tower(checkpoint, torch.float32)
    return encoder


@pytest.fixture(scope="module")
def batch(encoder, noise):
    return [encoder.preprocess(noise(*size, seed=i), 3136, 100_000) for i, size in enumerate(SIZES)]


def test_a_row_of_a_batch_equals_the_row_alone(encoder, batch):
    for patches, rows in zip(batch, encoder.encode(batch), strict=True):
        assert rows.shape[0] == patches.count // 4
        torch.testing.assert_close(rows, encoder.encode([patches])[0], atol=1e-5, rtol=0)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="MKL's products depend on how many rows there are")
@pytest.mark.parametrize("encoder", [case for case in CASES if case[1]], ids=str, indirect=True)
def test_with_kernels_it_has_the_same_bits(encoder, batch, noise):
    assert encoder.native
    tiny = encoder.preprocess(noise(28, 28), 28 * 28, 28 * 28)  # one token
    for patches, rows in zip([*batch, tiny], encoder.encode([*batch, tiny]), strict=True):
        assert torch.equal(rows, encoder.encode([patches])[0])


def test_both_equal_the_library_s_tower(encoder, batch):
    for patches, rows in zip(batch, encoder.encode(batch), strict=True):
        pixels = torch.from_numpy(encoder.preprocess.pixel_values(patches))
        with torch.inference_mode():
            expected = encoder.library_tower(pixels, torch.tensor([patches.grid_thw])).pooler_output
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(rows, expected, atol=1e-5, rtol=0)


def test_order_within_a_batch_does_not_matter(encoder, batch):
    forward = encoder.encode(batch)
    backward = encoder.encode(batch[::-1])[::-1]
    for one, other in zip(forward, backward, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_bfloat16_rows_are_near_the_float32_ones(encoder, batch, tmp_path):
    path = make_random_checkpoint(tmp_path / "bf16", size="tiny")
    checkpoint = open_checkpoint(str(path), needs=Half.VISION)
    towers = [Encoder.load(checkpoint, dtype, torch.device("cpu")) for dtype in (torch.float32, torch.bfloat16)]
    exact, rounded = (tower.encode(batch[:2]) for tower in towers)
    for one, other in zip(exact, rounded, strict=True):
        assert other.dtype is torch.bfloat16
        assert (one - other.float()).abs().mean() < 0.03 * one.abs().mean()
