"""The compiled kernel of prefills, against causal attention in float64, for many sizes of heads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lm_service.engine.packed.execution.attention import PrefillSpan
from lm_service.engine.packed.execution.kernel_attention import AttendByKernels, KernelAttention, plan_prefills
from lm_service.engine.packed.prefix_cache.pool import KV, SuffixPool
from lm_service.engine.packed.prefix_cache.tree import Node
from lookonce.models.compiled import attention_kernels
from tests.engine.test_native import LAYERS, SIZES, shape_of

LENGTHS = [(1,), (15, 119), (700, 3, 65), (64, 1), (33,)]  # paths of spans: the last is to be computed


class Prefixes:
    """Paths of spans: the last is to be computed from random queries, keys and values, the others hold random KV."""

    def __init__(self, shape, paths) -> None:
        torch.manual_seed(0)
        self.shape, self.paths = shape, []
        for number, lengths in enumerate(paths):
            path: list[Node] = []
            for depth, length in enumerate(lengths):
                content = np.zeros((8, length), dtype=np.int64)
                node = Node(10 * number + depth, path[-1] if path else None, content, ())
                node.kv = KV([torch.randn(LAYERS, 2, shape.kv_heads, length + 3, shape.head_dim)]).cut(2, length + 2)
                path.append(node)
            path[-1].kv.zero_()
            self.paths.append(path)
        self.counts = [lengths[-1] for lengths in paths]
        width = shape.heads + 2 * shape.kv_heads
        heads = torch.randn(LAYERS, sum(self.counts), width, shape.head_dim)  # one piece, as projections leave it
        self.q, self.k = heads[:, :, : shape.heads], heads[:, :, shape.heads : -shape.kv_heads]
        self.v = heads[:, :, -shape.kv_heads :]

    def prefill(self, *steps: float) -> torch.Tensor:
        """[LAYERS, T, heads * d]: what the layers but the last put out, the spans computed up to these shares of them,
        step by step."""
        outs = torch.zeros(LAYERS, sum(self.counts), self.shape.heads * self.shape.head_dim)
        begins = np.cumsum([0, *self.counts[:-1]])
        done = [0] * len(self.counts)
        for step in steps:
            spans, rows, at = [], [], 0
            for number, (path, count) in enumerate(zip(self.paths, self.counts, strict=True)):
                stop = max(done[number], round(step * count))
                if stop > done[number]:
                    taken = stop - done[number]
                    spans.append(PrefillSpan(path[-1], at, at + taken, done[number], path[:-1]))
                    rows += range(begins[number] + done[number], begins[number] + stop)
                    at, done[number] = at + taken, stop
            kernels = attention_kernels(self.shape)
            pool = SuffixPool(self.shape, 4096 * self.shape.token_bytes, 512)
            own = KernelAttention(kernels, self.shape, pool)
            attend = AttendByKernels(own, plan_prefills(spans, kernels.heads), None)
            for layer in range(LAYERS):
                out = torch.full((at, outs.shape[2]), 7.0)
                tensors = [x[layer, rows] for x in (self.q, self.k, self.v)]
                kernels.run(attend.calls(*tensors, out)[layer])
                outs[layer, rows] = out
        return outs

    def expected(self, layer: int) -> torch.Tensor:
        out, token, group = [], 0, self.shape.group
        for path, count in zip(self.paths, self.counts, strict=True):
            before = sum(node.length for node in path[:-1])
            held = [node.kv.layers[layer] for node in path]
            keys, values = (torch.cat([pair[side] for pair in held], dim=1).double() for side in (0, 1))
            seen = torch.arange(before + count) <= before + torch.arange(count)[:, None]
            heads = []
            for head in range(self.shape.heads):
                scores = self.q[layer, token : token + count, head].double() @ keys[head // group].T
                weights = (scores * self.shape.head_dim**-0.5).masked_fill(~seen, -torch.inf).softmax(-1)
                heads.append(weights @ values[head // group])
            out.append(torch.cat(heads, dim=1))
            token += count
        return torch.cat(out)


@pytest.mark.parametrize(("size", "group", "kv_heads"), SIZES)
def test_prefixes_attend_causally(size, group, kv_heads):
    prefixes = Prefixes(shape_of(size, group, kv_heads), LENGTHS)
    outs = prefixes.prefill(1.0)
    token = 0
    for path, count in zip(prefixes.paths, prefixes.counts, strict=True):
        for layer, (keys, values) in enumerate(path[-1].kv.layers):
            assert torch.equal(keys, prefixes.k[layer, token : token + count].transpose(0, 1))
            assert torch.equal(values, prefixes.v[layer, token : token + count].transpose(0, 1))
        token += count
    torch.testing.assert_close(outs[0].double(), prefixes.expected(0), atol=5e-6, rtol=1e-5)
    assert (outs[LAYERS - 1] == 7).all(), "the last layer's output is not wanted"


@pytest.mark.parametrize(("size", "group", "kv_heads"), [(32, 2, 2), (128, 6, 2)])
def test_the_bits_are_the_same_in_any_steps_and_on_any_threads(size, group, kv_heads):
    made = shape_of(size, group, kv_heads)
    whole = Prefixes(made, LENGTHS).prefill(1.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 3)
    try:
        assert torch.equal(Prefixes(made, LENGTHS).prefill(0.21, 0.22, 0.6, 1.0), whole)
    finally:
        torch.set_num_threads(threads)
    token = 0
    for lengths in LENGTHS:
        alone = Prefixes(made, LENGTHS)
        number = LENGTHS.index(lengths)
        rows = slice(token, token + lengths[-1])
        alone.paths, alone.counts = alone.paths[number : number + 1], alone.counts[number : number + 1]
        alone.q, alone.k, alone.v = (x[:, rows] for x in (alone.q, alone.k, alone.v))
        assert torch.equal(alone.prefill(1.0), whole[:, rows])
        token += lengths[-1]


def test_what_is_no_number_stays_so_and_harms_no_other_span():
    prefixes = Prefixes(shape_of(32, 2, 2), LENGTHS)
    clean = Prefixes(shape_of(32, 2, 2), LENGTHS).prefill(1.0)[0]
    prefixes.v[0, 100] = torch.nan  # in the second
    found = prefixes.prefill(1.0)[0]
    assert found[100:120].isnan().all() and not found[120:].isnan().any() and not found[0].isnan().any()
    assert torch.equal(found[120:], clean[120:])


def test_heads_too_many_for_a_block_have_no_kernel():
    assert attention_kernels(shape_of(8, 65, 1)) is None
