"""The tower's compiled kernels against float64, for many sizes of heads and images."""

from __future__ import annotations

import pytest
import torch
from structlog.testing import capture_logs
from torch import nn
from torch.nn import functional

from lookonce.models.checkpoint import Half, open_checkpoint
from lookonce.models.kernels.program import run_program
from lookonce.models.kernels.structs import calls_of
from lookonce.models.kernels.vision import tower_kernels as module
from lookonce.models.kernels.vision.tower_kernels import Kernels, Shape
from lookonce.models.qwen2_vl.preprocessing import Preprocessor
from lookonce.models.qwen2_vl.vision import Encoder

COUNTS = [4, 1, 200, 16, 63, 64, 65, 4, 130]
CPU = torch.device("cpu")


def kernels_for(size: int, heads: int) -> Kernels:
    return Kernels(Shape(size, heads, 4 * size * heads, 1e-6))


def attend(kernels: Kernels, counts: list[int], qkv: torch.Tensor, angles: torch.Tensor) -> list[torch.Tensor]:
    packed = kernels.pack(counts, angles.cos(), angles.sin())
    return list(kernels.attend(qkv, packed).split(counts))


def expected(counts: list[int], qkv: torch.Tensor, angles: torch.Tensor) -> list[torch.Tensor]:
    size = 2 * angles.shape[1]
    found = []
    for rows, turns in zip(qkv.double().split(counts), angles.double().split(counts), strict=True):
        query, key, value = rows.view(len(rows), 3, -1, size).permute(1, 2, 0, 3)
        halves = [x.chunk(2, dim=-1) for x in (query, key)]
        cos, sin = turns.cos(), turns.sin()
        query, key = (torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1) for one, two in halves)
        weights = (query @ key.transpose(1, 2) * size**-0.5).softmax(-1)
        found.append((weights @ value).transpose(0, 1).flatten(1))
    return found


def test_attention_in_several_calls_has_the_same_bits():
    torch.manual_seed(0)
    kernels = kernels_for(16, 3)
    qkv, angles = torch.randn(sum(COUNTS), 3 * 48), torch.randn(sum(COUNTS), 8)
    packed, out = kernels.pack(COUNTS, angles.cos(), angles.sin()), torch.empty(sum(COUNTS), 48)
    parts = kernels.attend_kernels(qkv, packed, out, at_once=1e6)
    assert len(parts) > 3
    for function, structs, _ in parts:
        run_program(calls_of([(function, structs)])[0], single_threaded=False)
    assert torch.equal(out, kernels.attend(qkv, packed))


@pytest.mark.parametrize(
    ("size", "heads"), [(8, 1), (16, 3), (24, 2), (32, 4), (40, 1), (64, 2), (80, 3), (128, 2), (256, 1)]
)
def test_images_attend_to_themselves(size, heads):
    """And to the same bits alone, in other company, and on any number of threads."""
    torch.manual_seed(size)
    kernels = kernels_for(size, heads)
    qkv, angles = torch.randn(sum(COUNTS), 3 * size * heads), 9 * torch.randn(sum(COUNTS), size // 2)
    found = attend(kernels, COUNTS, qkv, angles)
    for got, exact in zip(found, expected(COUNTS, qkv, angles), strict=True):
        torch.testing.assert_close(got.double(), exact, atol=5e-6, rtol=1e-5)

    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 3)
    try:
        assert all(map(torch.equal, found, attend(kernels, COUNTS, qkv, angles)))
    finally:
        torch.set_num_threads(threads)
    parts = zip(found, COUNTS, qkv.split(COUNTS), angles.split(COUNTS), strict=True)
    assert all(torch.equal(got, attend(kernels, [count], *alone)[0]) for got, count, *alone in parts)


def test_scores_as_large_as_float32_allows():
    torch.manual_seed(0)
    qkv, angles = torch.randn(300, 3 * 64), torch.randn(300, 16)
    qkv[:, 64:128] *= 1e3
    (found,) = attend(kernels_for(32, 2), [300], qkv, angles)
    torch.testing.assert_close(found.double(), expected([300], qkv, angles)[0], atol=5e-3, rtol=0)
    qkv[:, :128] *= 1e4
    assert attend(kernels_for(32, 2), [300], qkv, angles)[0].isfinite().all()


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_stays_so_and_harms_no_other_image(wrong):
    """The batcher fails images whose rows are not finite; nothing on the way there may make them numbers again."""
    torch.manual_seed(0)
    counts, kernels = [70, 70, 10], kernels_for(32, 2)
    qkv, angles = torch.randn(150, 3 * 64), torch.randn(150, 16)
    for part in range(3):  # a query, a key, a value
        spoiled = qkv.clone()
        spoiled[75, 64 * part + 3] = wrong
        found = attend(kernels, counts, spoiled, angles)
        assert not found[1].isfinite().all()
        assert found[0].isfinite().all() and found[2].isfinite().all()
    norm, x = nn.LayerNorm(64), torch.randn(9, 64)
    x[4, 5] = wrong
    broken = torch.arange(9) == 4
    for rows in (kernels.norm(x, norm), kernels.gelu(x.repeat(1, 4))):
        assert torch.equal(~rows.isfinite().all(1), broken)


@pytest.mark.parametrize("size", [(8, 1), (24, 3), (80, 16)])
@pytest.mark.parametrize("count", [1, 9, 300])
def test_rows_are_normed_and_activated(size, count):
    torch.manual_seed(count)
    kernels, width = kernels_for(*size), size[0] * size[1]
    norm = nn.LayerNorm(width, eps=1e-6)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x, added, out = (5 + 3 * torch.randn(count, width) for _ in range(3))

    def exact(rows):
        return functional.layer_norm(rows.double(), (width,), norm.weight.double(), norm.bias.double(), 1e-6)

    with torch.inference_mode():
        torch.testing.assert_close(kernels.norm(x, norm).double(), exact(x), atol=1e-5, rtol=1e-5)
        whole = x + added
        kernels.add_norm(x, added, norm, out)
        assert torch.equal(x, whole)
        torch.testing.assert_close(out.double(), exact(whole), atol=1e-5, rtol=1e-5)

        inner = 20 * torch.randn(count, 4 * width)
        inner[0, :4] = torch.tensor([-1e30, 1e30, 0.0, -60.0])
        wanted = inner.double() * torch.sigmoid(1.702 * inner.double())
        torch.testing.assert_close(kernels.gelu(inner).double(), wanted, atol=1e-6, rtol=1e-6)


def test_torch_serves_where_nothing_can_be_compiled(checkpoint_path, noise, monkeypatch):
    def refuse(*_):
        raise RuntimeError("no executable memory")

    checkpoint = open_checkpoint(str(checkpoint_path), needs=Half.VISION)
    image = Preprocessor(checkpoint.preprocessor)(noise(90, 120), 3136, 100_000)
    (wanted,) = Encoder.load(checkpoint, torch.float32, CPU).encode([image])
    module._compiled.cache_clear()
    monkeypatch.setattr("lookonce.models.kernels.compiling.binding.create_mcjit_compiler", refuse)
    with capture_logs() as logs:
        encoder = Encoder.load(checkpoint, torch.float32, CPU)
    assert [line["log_level"] for line in logs] == ["warning"] and not encoder.native
    torch.testing.assert_close(encoder.encode([image])[0], wanted, atol=1e-5, rtol=0)


def test_a_program_of_kernels_gives_what_they_give_between_other_products(checkpoint_path, noise, monkeypatch):
    """To the bit: epilogues of products compute what passes of their own do."""
    checkpoint = open_checkpoint(str(checkpoint_path), needs=Half.VISION)
    preprocess = Preprocessor(checkpoint.preprocessor)
    images = [preprocess(noise(60 + 30 * number, 120), 3136, 100_000) for number in range(3)]
    encoder = Encoder.load(checkpoint, torch.float32, CPU)
    program = encoder.encode(images)
    for rows in (1 << 20, 7):  # of an MLP at once
        monkeypatch.setattr(encoder._blocks, "_rows", rows)
        assert all(map(torch.equal, encoder.encode(images), program))
    assert encoder._blocks._compiled
    monkeypatch.setattr(encoder._blocks, "_compiled", False)
    assert all(map(torch.equal, encoder.encode(images), program))


def test_what_has_kernels(checkpoint_path):
    checkpoint = open_checkpoint(str(checkpoint_path), needs=Half.VISION)
    assert Encoder.load(checkpoint, torch.float32, CPU).native
    assert Encoder.load(checkpoint, torch.float32, CPU, quantization="int8").native
    assert not Encoder.load(checkpoint, torch.float32, CPU, native=False).native
    assert not Encoder.load(checkpoint, torch.bfloat16, CPU).native
    assert not Shape(20, 2, 160, 1e-6).supported
