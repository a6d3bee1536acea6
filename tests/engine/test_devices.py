"""What goes wrong off the CPU in float32 only, shown without a GPU: half precision here, devices that stand in, and
clocks and kernels that are told what a GPU's would say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from lm_service.engine.packed.engine import rows_of
from lm_service.engine.packed.execution import attention
from lm_service.engine.packed.execution.attention import (
    AttentionPlan,
    PackedAttention,
    SharedSpan,
    SuffixBatch,
    partial_attention_for,
    plain_attention,
    products,
)
from lm_service.engine.packed.execution.runner import EventClock, WallClock, work_clock
from lm_service.engine.types import DamagedRecord
from lookonce.core.dtypes import auto_dtype
from lookonce.models.qwen2_vl.vision import attend_runs, attend_varlen
from lookonce.models.tensors import view_of

HEADS, GROUP, SIZE, OWN, SHARED = 2, 3, 64, 24, 40


def biased(seed: int, tokens: int, bias: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [K, tokens, d] in bfloat16; keys have a bias of this size, another in each dimension."""
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, HEADS, tokens, SIZE, generator=generator).unbind()
    direction = torch.linspace(-1, 1, SIZE)
    return (k + bias * direction).bfloat16(), v.bfloat16()


def exact(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attention of q [n, K, G, d] over all keys [K, L, d], in float64."""
    scores = torch.einsum("nkgd,kld->nkgl", q.double(), keys.double()) * SIZE**-0.5
    return torch.einsum("nkgl,kld->nkgd", scores.softmax(-1), values.double())


@pytest.mark.parametrize("bias", [0.0, 10.0, 100.0])
@pytest.mark.parametrize("shared", [False, True])
def test_scores_of_half_precision_are_accumulated_in_float32(bias: float, shared: bool) -> None:
    """An answer's own tail, alone and behind a shared prefix, in bfloat16 and with keys as Qwen2's: no further from
    float64 than rounding the result and the weights takes it (arXiv:2409.12191's models have such biases; transformers
    #33317, #35749)."""
    own, before = biased(1, OWN, bias), biased(2, SHARED, bias)
    q = torch.randn(1, HEADS, GROUP, SIZE, generator=torch.Generator().manual_seed(3)).bfloat16()
    shape = SimpleNamespace(
        heads=HEADS * GROUP, kv_heads=HEADS, group=GROUP, head_dim=SIZE, rules=None, device=torch.device("cpu"),
        dtype=torch.bfloat16, layers=1, attends_last=True,
    )  # fmt: skip
    held = [torch.zeros(1, HEADS, OWN, SIZE, dtype=torch.bfloat16) for _ in range(2)]
    for kept, side in zip(held, own, strict=True):
        kept[0, :, : OWN - 1] = side[:, : OWN - 1]
    flat = [side.view(-1, SIZE) for side in held]
    pool = SimpleNamespace(flat=lambda layer: flat, class_view=lambda layer, capacity: held)
    node = SimpleNamespace(kv=SimpleNamespace(layers=[before]), length=SHARED)
    batch = SuffixBatch(OWN, OWN, slice(0, 1), None, None, slice(0, 1), 1, torch.zeros(1, 1, 1, OWN))
    rows = torch.arange(HEADS) * OWN + OWN - 1
    spans = [SharedSpan(node, 0, 1, first=True)] if shared else []
    attend = PackedAttention(shape, pool, AttentionPlan(0, [], spans, [batch], rows))
    new = [side[:, OWN - 1][None].contiguous() for side in own]
    found = attend(0, q.reshape(1, -1, SIZE), *new).view(1, HEADS, GROUP, SIZE)
    keys, values = (torch.cat([b, o], 1) if shared else o for b, o in zip(before, own, strict=True))
    wanted = exact(q, keys, values)
    assert (found.double() - wanted).abs().max() <= 2**-7 * values.abs().max()


def test_the_old_way_would_be_noticed() -> None:
    """What is asserted above fails where products are rounded to bfloat16 before the softmax."""
    (keys, values), bias = biased(1, OWN, 100.0), 100.0
    q = torch.randn(1, HEADS, GROUP, SIZE, generator=torch.Generator().manual_seed(3)).bfloat16()
    rounded = torch.einsum("nkgd,kld->nkgl", q, keys).float() * SIZE**-0.5
    found = torch.einsum("nkgl,kld->nkgd", rounded.softmax(-1).bfloat16(), values)
    assert (found.double() - exact(q, keys, values)).abs().max() > 2**-5 * values.abs().max(), bias


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_long_prefixes_take_bounded_temporaries(monkeypatch: pytest.MonkeyPatch, causal: bool, masked: bool) -> None:
    """float32 on a GPU has no flash attention: rows are taken in pieces, and the result is that of all at once."""
    q, k, v = torch.randn(3, 1, 2, 50, 16).unbind()
    mask = torch.where(torch.rand(50, 50) < 0.2, -torch.inf, 0.0).fill_diagonal_(0) if masked else None
    whole = plain_attention(q, k, v, causal, mask)
    most: list[int] = []
    real = attention._plain_rows
    monkeypatch.setattr(attention, "_SCORES", 700)
    monkeypatch.setattr(
        attention, "_plain_rows", lambda q, k, *rest: most.append(2 * q.shape[-2] * k.shape[-2]) or real(q, k, *rest)
    )
    pieces = plain_attention(q, k, v, causal, mask)
    assert len(most) > 5 and max(most) <= 700
    for one, other in zip(whole, pieces, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_an_old_gpu_computes_in_float32_and_is_not_asked_for_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """T4 (7.5), V100 (7.0): neither bfloat16 nor torch's flash attention."""
    assert [auto_dtype("cuda", "bfloat16", at) for at in ((7, 0), (7, 5), (8, 0), (9, 0))] == [
        "float32", "float32", "bfloat16", "bfloat16",
    ]  # fmt: skip
    for capability, expected in (((7, 5), plain_attention), ((8, 0), attention._cuda_flash)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, at=capability: at)
        assert partial_attention_for(torch.device("cuda", 0), torch.float16) is expected
    assert partial_attention_for(torch.device("cuda", 0), torch.float32) is plain_attention


def test_products_are_float32_whatever_they_are_of() -> None:
    q, k = torch.randn(2, 1, 3, 5, 8, dtype=torch.float64).bfloat16().unbind()
    found = products(q, k)
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.matmul(q.float(), k.float().transpose(-1, -2)))


class Recorded:
    """Stands for torch.cuda.Event: done when it is told to be."""

    made: ClassVar[list[Recorded]] = []

    def __init__(self) -> None:
        self.made.append(self)
        self.done, self.at = False, 0.0

    def record(self, stream: object) -> None:
        self.at = 10.0 * len(self.made)

    def query(self) -> bool:
        return self.done

    def elapsed_time(self, other: Recorded) -> float:
        return other.at - self.at


def test_a_gpus_own_events_tell_its_time_and_nobody_waits_for_them() -> None:
    Recorded.made.clear()
    clock = EventClock(Recorded)
    for _ in range(3):
        with clock:
            pass
    assert clock.seconds == 0, "nothing is done yet"
    for event in Recorded.made[:4]:
        event.done = True
    assert clock.seconds == pytest.approx(0.02)
    with pytest.raises(ZeroDivisionError), clock:
        raise ZeroDivisionError
    assert clock.seconds == pytest.approx(0.02), "a forward that failed has no end"
    assert isinstance(work_clock(torch.device("cpu")), WallClock)
    assert isinstance(work_clock(torch.device("cuda")), EventClock)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_rows_are_found_finite_before_they_go_to_a_device(value: float) -> None:
    """No device is asked: `meta` has no numbers to ask for."""
    rows = torch.randn(4, 8)
    meta = rows_of(view_of(rows), device=torch.device("meta"), dtype=torch.float16)
    assert meta.device.type == "meta" and meta.shape == rows.shape
    rows[1, 1] = value
    with pytest.raises(DamagedRecord):
        rows_of(view_of(rows), device=torch.device("meta"), dtype=torch.float16)


def test_one_kernel_for_images_of_all_sizes() -> None:
    """What torch's varlen_attn is given says what the images' own attentions compute; the kernel is a GPU's."""
    runs, heads, size = [(2, 6), (1, 10), (3, 4)], 2, 8
    total = sum(images * patches for images, patches in runs)
    qkv = torch.randn(total, 3 * heads * size)
    angles = torch.rand(total, 1, size // 2)
    seen: list[tuple[int, ...]] = []

    def kernel(q, k, v, ends, ends_k, longest, longest_k):  # type: ignore[no-untyped-def]
        assert ends is ends_k and longest == longest_k == 10 and ends.dtype == torch.int32
        seen.append(tuple(ends.tolist()))
        out = torch.empty_like(q)
        for first, last in zip(ends.tolist(), ends.tolist()[1:], strict=False):
            part = [x[first:last].transpose(0, 1) for x in (q, k, v)]
            out[first:last] = torch.nn.functional.scaled_dot_product_attention(*part).transpose(0, 1)
        return out

    expected = attend_runs(qkv, heads, angles.cos(), angles.sin(), runs)
    from lookonce.models.qwen2_vl.vision import _rotate

    query, key, value = qkv.view(total, 3, heads, -1).unbind(1)
    query, key = (_rotate(x, angles.cos(), angles.sin()) for x in (query, key))
    found = attend_varlen(query, key, value, runs, kernel)
    assert torch.allclose(found, expected, atol=1e-5)
    assert seen == [(0, 6, 12, 22, 26, 30, 34)]
