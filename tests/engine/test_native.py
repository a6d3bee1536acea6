"""The compiled kernels against softmax attention in float64, for many sizes of heads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.nn import functional

from lm_service.engine.packed.execution import kernel_attention
from lm_service.engine.packed.execution.attention import SharedSpan
from lm_service.engine.packed.execution.kernel_attention import (
    AttendByKernels,
    KernelAttention,
    Suffixes,
    plan_suffixes,
)
from lm_service.engine.packed.prefix_cache.pool import KV, SuffixPool
from lm_service.engine.packed.prefix_cache.tree import Node
from lookonce.models.compiled import attention_kernels, text_rows
from lookonce.models.kernels.attention import step_kernels as attention
from lookonce.models.text_adapter import ModelShape, Stage

LAYERS = 2
SIZES = [(8, 1, 1), (12, 5, 1), (20, 3, 2), (32, 2, 2), (40, 8, 1), (64, 7, 4), (80, 2, 3), (128, 6, 2), (256, 1, 2)]


def shape_of(size: int, group: int, kv_heads: int, dtype: torch.dtype = torch.float32) -> ModelShape:
    stage = Stage(torch.device("cpu"), LAYERS)
    return ModelShape(LAYERS, group * kv_heads, kv_heads, size, 64, 512, 4096, dtype, (stage,))


@dataclass
class Suffix:
    """A sequence: keys it holds already, new tokens, the spans it sees, which of its keys each new token sees."""

    held: int
    new: int
    sees: list[int]
    mask: np.ndarray | None = None


class Scene:
    """A step made by hand: spans of prefixes with random KV, and suffixes in a pool."""

    def __init__(self, shape: ModelShape, lengths: list[int], suffixes: list[Suffix], seed: int = 0) -> None:
        self.shape, self.suffixes = shape, suffixes
        torch.manual_seed(seed)
        self.nodes = []
        for number, length in enumerate(lengths):
            node = Node(number, None, np.zeros((4, length), dtype=np.int64), ())
            node.kv = KV([torch.randn(LAYERS, 2, shape.kv_heads, length + 3, shape.head_dim)]).cut(2, length + 2)
            self.nodes.append(node)
        self.pool = SuffixPool(shape, 64 * 4096 * shape.token_bytes // 32, 4096)
        self.slots = [self.pool.allocate(suffix.held + suffix.new) for suffix in suffixes]
        for slot in self.slots:
            for part in self.pool.kv(slot).parts:
                part.normal_()
        count = sum(suffix.new for suffix in suffixes)
        width = shape.heads + 2 * shape.kv_heads
        heads = torch.randn(LAYERS, count, width, shape.head_dim) * 2  # one piece, as projections leave it
        self.q, self.k = heads[:, :, : shape.heads], heads[:, :, shape.heads : -shape.kv_heads]
        self.v = heads[:, :, -shape.kv_heads :]

    def spans(self) -> list[SharedSpan]:
        found = []
        for number, node in enumerate(self.nodes):
            tokens, begin = [], 0
            for suffix in self.suffixes:
                tokens += list(range(begin, begin + suffix.new)) if number in suffix.sees else []
                begin += suffix.new
            assert tokens == list(range(tokens[0], tokens[-1] + 1)), "who sees a span are neighbours"
            found.append(SharedSpan(node, tokens[0], tokens[-1] + 1, first=not number))
        return found

    def told(self) -> Suffixes:
        rows, visible, mask_rows, masks = [], [], [], []
        width = max((suffix.held + suffix.new for suffix in self.suffixes if suffix.mask is not None), default=0)
        for suffix, slot in zip(self.suffixes, self.slots, strict=True):
            heads = np.arange(self.shape.kv_heads) * slot.capacity
            for token in range(suffix.new):
                rows.append(self.pool.row_of(slot) + suffix.held + token + heads)
                visible.append(suffix.held + token + 1)
                mask_rows.append(-1 if suffix.mask is None else len(masks))
                if suffix.mask is not None:
                    masks.append(np.pad(suffix.mask[token], (0, width - suffix.mask.shape[1])))
        table = np.array(masks, dtype=bool).reshape(len(masks), width)
        return Suffixes(np.array(rows), np.array(visible), np.array(mask_rows), table)

    def attend(self) -> list[torch.Tensor]:
        """Each layer's output [T, heads * d] by the kernels."""
        kernels = attention_kernels(self.shape)
        plan = plan_suffixes(self.spans(), self.told(), kernels.heads)
        self.splits = len(plan.splits)
        attend = AttendByKernels(KernelAttention(kernels, self.shape, self.pool), None, plan)
        return [attend(layer, self.q[layer], self.k[layer], self.v[layer]) for layer in range(LAYERS)]

    def expected(self, layer: int) -> torch.Tensor:
        """The same, one row at a time; the pool holds the new keys and values by now."""
        out, token, group = [], 0, self.shape.group
        for suffix, slot in zip(self.suffixes, self.slots, strict=True):
            own = self.pool.kv(slot).layers[layer]
            for new in range(suffix.new):
                length = suffix.held + new + 1
                seen = torch.ones(length, dtype=torch.bool)
                if suffix.mask is not None:
                    seen = torch.from_numpy(suffix.mask[new, :length])
                row = []
                for head in range(self.shape.heads):
                    parts = [self.nodes[number].kv.layers[layer] for number in suffix.sees]
                    keys, values = (
                        torch.cat(
                            [*(part[side][head // group] for part in parts), own[side][head // group, :length][seen]]
                        )
                        for side in (0, 1)
                    )
                    scores = keys.double() @ self.q[layer, token, head].double() * self.shape.head_dim**-0.5
                    row.append(scores.softmax(0) @ values.double())
                out.append(torch.cat(row))
                token += 1
        return torch.stack(out)

    def check(self, tolerance: float = 5e-6) -> list[torch.Tensor]:
        found = self.attend()
        for layer in range(LAYERS):
            at = 0
            for suffix, slot in zip(self.suffixes, self.slots, strict=True):
                for side, new in ((0, self.k), (1, self.v)):
                    held = self.pool.kv(slot).layers[layer][side][:, suffix.held : suffix.held + suffix.new]
                    assert torch.equal(held, new[layer, at : at + suffix.new].transpose(0, 1))
                at += suffix.new
            torch.testing.assert_close(found[layer].double(), self.expected(layer), atol=tolerance, rtol=1e-5)
        return found


@pytest.mark.parametrize(("size", "group", "kv_heads"), SIZES)
def test_decoding_and_prefill_over_shared_spans(size, group, kv_heads):
    """Spans of one key and of several chunks, seen by some, by all and one after another; suffixes of all lengths."""
    suffixes = [
        Suffix(0, 1, [0]),
        Suffix(31, 1, [0]),
        Suffix(63, 1, [0, 1]),
        Suffix(64, 2, [0, 1]),
        Suffix(0, 7, [0, 1]),
    ]
    suffixes += [Suffix(200, 1, []), Suffix(0, 3, []), Suffix(5, 1, [2]), Suffix(3, 66, [2, 3])]
    Scene(shape_of(size, group, kv_heads), [1037, 1, 63, 130], suffixes).check()


@pytest.mark.parametrize(("size", "group", "kv_heads"), [(32, 2, 2), (64, 7, 4)])
def test_in_splits_and_on_one_thread_the_bits_are_the_same(size, group, kv_heads, monkeypatch):
    suffixes = [Suffix(3 * i % 40, 1 + i % 5, [0, 1 + (i >= 20)]) for i in range(41)]
    made = shape_of(size, group, kv_heads)
    whole = Scene(made, [700, 20, 513], suffixes)
    found = whole.check()
    cut = Scene(made, [700, 20, 513], suffixes)
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 3)
    monkeypatch.setattr(kernel_attention, "_ROOM", 20_000)
    try:
        again = cut.check()
    finally:
        torch.set_num_threads(threads)
    assert whole.splits == 1 and cut.splits > 2
    assert all(map(torch.equal, found, again))


def test_a_row_is_the_same_bits_alone_and_in_company():
    made = shape_of(32, 2, 2)
    suffixes = [Suffix(10 + i, 1, [0]) for i in range(45)]
    company = Scene(made, [900], suffixes)
    found = company.attend()
    for token in (0, 17, 44):
        alone = Scene(made, [900], [suffixes[token]])
        alone.nodes = company.nodes
        for mine, theirs in zip(
            alone.pool.kv(alone.slots[0]).parts, company.pool.kv(company.slots[token]).parts, strict=True
        ):
            mine.copy_(theirs)
        alone.q, alone.k, alone.v = (x[:, token : token + 1] for x in (company.q, company.k, company.v))
        assert all(torch.equal(one[0], many[token]) for one, many in zip(alone.attend(), found, strict=True))


def test_masked_keys_weigh_nothing():
    """Branches of a trie: each new token sees what was held, and some of the new ones."""
    mask = np.ones((6, 76), dtype=bool)
    mask[:, 70:] = np.tril(np.random.default_rng(0).random((6, 6)) > 0.5) | np.eye(6, dtype=bool)
    sparse = np.zeros((70, 70), dtype=bool)
    np.fill_diagonal(sparse, True)  # whole blocks of keys that a row doesn't see
    suffixes = [Suffix(70, 6, [0], mask), Suffix(4, 2, [0]), Suffix(0, 70, [0], sparse), Suffix(0, 70, [], sparse)]
    Scene(shape_of(32, 2, 2), [100], suffixes).check()


def test_scores_as_large_as_float32_allows():
    """Neither overflow nor a sum of zero, whatever lies before what matters."""
    scene = Scene(shape_of(16, 2, 1), [300], [Suffix(80, 1, [0]), Suffix(2, 3, [0])])
    scene.nodes[0].kv.parts[0][:, 0] *= 300
    scene.check(tolerance=1e-3)  # scores of a thousand are that inexact in float32
    scene = Scene(shape_of(16, 2, 1), [300], [Suffix(80, 1, [0]), Suffix(2, 3, [0])])
    scene.nodes[0].kv.parts[0][:, 0] -= 1e4
    found = scene.attend()
    assert all(torch.isfinite(layer).all() for layer in found)


@pytest.mark.parametrize(
    ("hidden", "size", "rotated"), [(128, 32, 6), (64, 16, 3), (100, 8, 1), (1536, 128, 14), (36, 24, 2)]
)
@pytest.mark.parametrize("count", [1, 9, 300])
def test_rows_are_normed_and_rotated(hidden, size, rotated, count):
    torch.manual_seed(count)
    kernels = text_rows(hidden, size, rotated, 1e-6, torch.zeros(1))
    x, weight = torch.randn(count, 2 * hidden)[:, hidden:] * 3, torch.randn(hidden)
    expected = functional.rms_norm(x.double(), (hidden,), weight.double(), 1e-6)
    torch.testing.assert_close(kernels.norm(x, weight).double(), expected, atol=2e-6, rtol=2e-6)

    heads = torch.randn(count, rotated + 2, size)
    angles = torch.randn(size // 2, count).t().unsqueeze(1)
    first, second = heads[:, :rotated].double().chunk(2, dim=-1)
    cos, sin = angles.double().cos(), angles.double().sin()
    expected = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    values = heads[:, rotated:].clone()
    kernels.rotate(heads[:, :rotated], angles.cos(), angles.sin())
    torch.testing.assert_close(heads[:, :rotated].double(), expected, atol=2e-6, rtol=2e-6)
    assert torch.equal(heads[:, rotated:], values)


def test_what_is_no_number_stays_so_and_harms_nobody_else():
    """The engine ends requests whose logits are no numbers; nothing on the way there may make them some again."""
    suffixes = [Suffix(3, 2, [0]), Suffix(70, 1, [0]), Suffix(3, 1, [0])]
    scene = Scene(shape_of(32, 2, 2), [600], suffixes)
    scene.q[:, 1] = torch.nan
    scene.k[:, 2] = torch.inf
    found = scene.attend()
    assert all(layer[1].isnan().all() and layer[2].isnan().any() for layer in found)
    assert all(layer[row].isfinite().all() for layer in found for row in (0, 3))


def test_torch_serves_where_nothing_can_be_compiled(monkeypatch):
    def refuse(*_):
        raise RuntimeError("no executable memory")

    attention._compiled.cache_clear()
    monkeypatch.setattr("lookonce.models.kernels.compiling.binding.create_mcjit_compiler", refuse)
    assert attention_kernels(shape_of(32, 2, 2)) is None
    assert text_rows(40, 8, 3, 1e-5, torch.zeros(1)) is None


@pytest.mark.parametrize("shape", [shape_of(6, 1, 1), shape_of(512, 1, 1), shape_of(64, 2, 2, torch.bfloat16)])
def test_what_has_no_kernels(shape):
    assert attention_kernels(shape) is None
