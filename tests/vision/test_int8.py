"""Int8 weights: close to the plain ones, the same for an image alone and in company, and never taken for the plain."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

from lm_service.prompt import AcceptedEncoders
from lookonce.core.dtypes import ELSEWHERE, ON_CPU, ON_CUDA, SCHEMES
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.identity import EmbeddingReference
from lookonce.models.checkpoint import Half, open_checkpoint
from lookonce.models.linear import Int8Linear
from lookonce.models.quantization import CudaRows, WidenedWeights, check_usable, scheme
from lookonce.models.qwen2_vl.preprocessing import Preprocessor
from lookonce.models.qwen2_vl.vision import Encoder
from tests.images import photograph

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_close_and_rows_keep_to_themselves(dtype):
    torch.manual_seed(0)
    weight, bias = torch.randn(96, 64) / 8, torch.randn(96)
    x = torch.randn(3, 5, 64, dtype=dtype) * torch.logspace(-3, 3, 15).view(3, 5, 1).to(dtype)
    matrix = Int8Linear(weight.to(dtype), bias.to(dtype))
    got = matrix(x)
    exact = torch.nn.functional.linear(x.float(), weight, bias)
    assert got.shape == (3, 5, 96) and got.dtype == dtype
    assert ((got.float() - exact).norm(dim=-1) / exact.norm(dim=-1)).max() < 0.03
    for one in range(3):
        for row in range(5):
            assert torch.equal(matrix(x[one, row]), got[one, row])
    assert torch.equal(matrix(torch.zeros(1, 64, dtype=dtype))[0], bias.to(dtype))


def test_elsewhere_the_weights_alone_are_rounded():
    """The way of other devices, computed here: as exact as eight bits of weight are."""
    torch.manual_seed(0)
    weight, x = torch.randn(96, 64) / 8, torch.randn(7, 64)
    error = (WidenedWeights(weight)(x) - x @ weight.t()).norm() / (x @ weight.t()).norm()
    assert 0 < error < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_way_of_cuda_computed_here(dtype):
    """bitsandbytes computes its operators on the CPU too, if slowly: their arithmetic is what is looked at."""
    torch.manual_seed(0)
    weight = torch.randn(96, 64) / 8
    x = torch.randn(15, 64, dtype=dtype) * torch.logspace(-6, 6, 15).view(15, 1).to(dtype)  # beyond float16's range
    product = CudaRows(weight.to(dtype))
    got, exact = product(x), x.float() @ weight.t()
    assert got.dtype == dtype and ((got.float() - exact).norm(dim=-1) / exact.norm(dim=-1)).max() < 0.03
    for row in range(15):
        assert torch.equal(product(x[row : row + 1])[0], got[row])
    assert not product(torch.zeros(2, 64, dtype=dtype)).any()


def test_cuda_without_the_library_is_refused_by_name(monkeypatch):
    gpu = torch.device("cuda:0")
    check_usable("int8", [gpu, CPU])
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    check_usable("none", [gpu])
    check_usable("int8", [CPU])
    with pytest.raises(LookonceError, match=r"quantization int8 on CUDA.*pip install 'lookonce\[int8\]'") as caught:
        check_usable("int8", [CPU, gpu])
    assert caught.value.param == "quantization"


def test_embeddings_are_close_and_an_image_alone_is_as_in_company(checkpoint_path):
    checkpoint = open_checkpoint(str(checkpoint_path), needs=Half.VISION)
    preprocess = Preprocessor(checkpoint.preprocessor)
    images = [preprocess(photograph(name, (112, 84)).convert("RGB"), 3136, 1 << 20) for name in ("coffee", "chelsea")]
    images.append(preprocess(Image.new("RGB", (56, 140), "red"), 3136, 1 << 20))
    plain = Encoder.load(checkpoint, torch.float32, CPU).encode(images)
    small = Encoder.load(checkpoint, torch.float32, CPU, quantization="int8")
    together = small.encode(images)
    for image, exact, got in zip(images, plain, together, strict=True):
        assert 0 < (got - exact).norm() / exact.norm() < 0.1
        torch.testing.assert_close(small.encode([image])[0], got)  # the patch embedding and the merger round


def test_int8_is_another_encoder(checkpoint_path):
    checkpoint = open_checkpoint(str(checkpoint_path), needs=Half.VISION)
    prints = {way: checkpoint.encoder_spec("float32", way).fingerprint() for way in ("none", *SCHEMES)}
    assert len(set(prints.values())) == 4
    assert scheme("none", CPU) == "none" and scheme("int8", CPU) == ON_CPU
    assert scheme("int8", torch.device("cuda:0")) == ON_CUDA and scheme("int8", torch.device("mps")) == ELSEWHERE
    image = EmbeddingReference(bytes(32), prints["none"], bytes(32), (1, 2, 2), 1, 2, 2)
    plain = AcceptedEncoders.of(checkpoint, "float32")
    small = AcceptedEncoders.of(checkpoint, "float32", "int8")
    plain.check(image)
    for way in SCHEMES:
        small.check(replace(image, fingerprint=prints[way]))
    for accepted, wrong in ((plain, prints[ON_CPU]), (small, prints["none"])):
        with pytest.raises(LookonceError) as caught:
            accepted.check(replace(image, fingerprint=wrong))
        assert caught.value.kind is ErrorKind.FINGERPRINT_MISMATCH
