"""Attention of one packed step: shared prefixes once for all their sequences, each sequence's own suffix in one batch.

Partial results over disjoint keys are merged by their log-sum-exp (FlashAttention's split softmax; "cascade" attention
as in FlashInfer and Hydragen, arXiv:2402.05099), which is exact. Shapes: T tokens, H query heads, K key-value heads,
G = H / K, d head size. Knows nothing of sequences: `plan.py` says who sees what.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.nn import functional

from lm_service.engine.packed.execution.sight import Sight, capped
from lm_service.engine.packed.prefix_cache.pool import SuffixPool
from lm_service.engine.packed.prefix_cache.tree import Node
from lookonce.core.dtypes import FAST_BFLOAT16
from lookonce.models.text_adapter import Attend, ModelShape

FLASH_FROM = FAST_BFLOAT16
"""Least compute capability of a CUDA GPU that torch has flash attention for."""
_SCORES = 1 << 24
"""Scores that `plain_attention` holds at once: 64 MiB of them."""
_FEW_BEFORE = 0.125  # of a span: so many keys before it are better seen together with it


@dataclass(frozen=True)
class PrefillSpan:
    """Tokens of a prefix in its prefill: the step's tokens [begin, end) are those of `node` from `start` on."""

    node: Node
    begin: int
    end: int
    start: int
    ancestors: list[Node]
    sight: Sight | None = None  # what each sees; None: itself and all before it
    beyond: int = 0  # of the tokens, the last ones that are seen and not stored

    def to(self, device: torch.device) -> PrefillSpan:
        """The same with its masks on another device."""
        return self if self.sight is None else replace(self, sight=self.sight.to(device))


@dataclass(frozen=True)
class SharedSpan:
    """A complete node of the prefix cache, seen by suffix tokens [begin, end), which count from the first one."""

    node: Node
    begin: int
    end: int
    first: bool  # nothing shared comes before it
    start: int = 0  # its tokens before this one are not seen
    mask: torch.Tensor | None = None  # added to the scores, [tokens * G, keys from `start` on]; None: all are seen

    def to(self, device: torch.device) -> SharedSpan:
        """The same with its mask on another device."""
        return self if self.mask is None else replace(self, mask=self.mask.to(device))

    def seen(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [1, K, L, d] of what is seen."""
        keys, values = self.node.kv.layers[layer]
        if self.start:
            keys, values = keys[:, self.start :], values[:, self.start :]
        return keys.unsqueeze(0), values.unsqueeze(0)


@dataclass(frozen=True)
class SuffixBatch:
    """Suffixes in slots of one capacity with about as many new tokens each: a padded batch of b rows of n tokens."""

    capacity: int
    length: int  # keys looked at: the longest suffix of the batch
    slots: slice | torch.Tensor  # b places of the pool's `class_view`
    gather: torch.Tensor | None  # int64 [b * n]: suffix token of each place; None: as they come
    scatter: torch.Tensor | None  # int64 [tokens]: place of each token of `tokens`; None: all, as they come
    tokens: torch.Tensor | slice  # which suffix tokens the batch answers for
    batch: int
    mask: torch.Tensor  # [b or 1, 1, n * G or 1, length], 0 where a key may be seen, else -inf

    def to(self, device: torch.device) -> SuffixBatch:
        """The same with its tensors on another device."""
        return replace(
            self,
            slots=self.slots if isinstance(self.slots, slice) else self.slots.to(device),
            gather=None if self.gather is None else self.gather.to(device),
            scatter=None if self.scatter is None else self.scatter.to(device),
            tokens=self.tokens if isinstance(self.tokens, slice) else self.tokens.to(device),
            mask=self.mask.to(device),
        )


@dataclass
class AttentionPlan:
    """Who sees what in one step; the same for every layer."""

    prefill_tokens: int  # tokens [0, prefill_tokens) belong to `prefills`, the others to suffixes
    prefills: list[PrefillSpan]
    shared: list[SharedSpan]
    suffixes: list[SuffixBatch]
    suffix_rows: torch.Tensor  # int64 [suffix tokens * K]: where a suffix token's heads are stored in the pool

    def to(self, device: torch.device) -> AttentionPlan:
        """The same with its tensors on another device."""
        return replace(
            self,
            prefills=[each.to(device) for each in self.prefills],
            shared=[each.to(device) for each in self.shared],
            suffixes=[each.to(device) for each in self.suffixes],
            suffix_rows=self.suffix_rows.to(device),
        )


def attention_over(shape: ModelShape, pool: SuffixPool, plans: Mapping[int | None, AttentionPlan]) -> Attend:
    """The attention of one step by torch's operations; its plans, by the windows of layers (None: all is seen), lie on
    the model's first device."""
    if len(shape.stages) == 1 and shape.rules is None:
        return PackedAttention(shape, pool, plans[None])
    return LayeredAttention(shape, pool, plans)


class LayeredAttention:
    """An `Attend` over layers on several devices or with several windows: each device has the plans."""

    calls = None

    def __init__(self, shape: ModelShape, pool: SuffixPool, plans: Mapping[int | None, AttentionPlan]) -> None:
        windows = iter(shape.rules.windows if shape.rules is not None else [None] * shape.layers)
        self._by_layer: list[PackedAttention] = []
        for stage in shape.stages:
            here = {
                window: PackedAttention(shape, pool, plan.to(stage.device), stage.device)
                for window, plan in plans.items()
            }
            self._by_layer += [here[next(windows)] for _ in range(stage.layers)]

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self._by_layer[layer](layer, q, k, v)


class PackedAttention:
    """An `Attend` over a plan, for layers on one device."""

    calls = None

    def __init__(
        self, shape: ModelShape, pool: SuffixPool, plan: AttentionPlan, device: torch.device | None = None
    ) -> None:
        """`device` is the layers', unless it is the model's first."""
        self._shape = shape
        self._pool = pool
        self._plan = plan
        self._softcap = shape.rules.softcap if shape.rules is not None else None
        self._partial = partial_attention_for(device or shape.device, shape.dtype, self._softcap)

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        plan, shape = self._plan, self._shape
        count = plan.prefill_tokens
        if not plan.prefills:
            return self._attend_suffixes(layer, q, k, v)
        out = q.new_empty((q.shape[0], shape.heads * shape.head_dim))
        self._prefill_all(layer, q, k, v, out)
        if count < q.shape[0]:
            out[count:] = self._attend_suffixes(layer, q[count:], k[count:], v[count:])
        return out

    def _prefill_all(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> None:
        # no row of a prefill is read after the last layer's keys and values
        final = layer == self._shape.layers - 1 and self._shape.attends_last
        for span in self._plan.prefills:
            rows = slice(span.begin, span.end)
            self._prefill(span, layer, q[rows], k[rows], v[rows], None if final else out[rows])

    def _prefill(
        self,
        span: PrefillSpan,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor | None,
    ) -> None:
        """Store a span's keys and values; unless `out` is None, attend to all before it and to itself, causally."""
        shape, count = self._shape, q.shape[0] - span.beyond
        keys, values = span.node.kv.layers[layer]
        k, v = k.transpose(0, 1), v.transpose(0, 1)
        keys[:, span.start : span.start + count] = k[:, :count]
        values[:, span.start : span.start + count] = v[:, :count]
        if out is None:
            return
        grouped = q.view(q.shape[0], shape.kv_heads, shape.group, shape.head_dim).permute(1, 2, 0, 3)  # [K, G, n, d]
        seen = [node.kv.layers[layer] for node in span.ancestors]
        if span.sight is not None:
            seen += [(keys[:, : span.start], values[:, : span.start]), (k, v)]
            mixed = span.sight.attend(grouped, seen, self._softcap)
            out.view(-1, shape.kv_heads, shape.group, shape.head_dim).copy_(mixed.permute(2, 0, 1, 3))
            return
        before = span.start + sum(node.length for node in span.ancestors)
        if before <= count * _FEW_BEFORE:
            seen.append((keys[:, : span.start + count], values[:, : span.start + count]))
            mixed = self._causal(grouped, seen, before)
        else:
            if span.start:
                seen.append((keys[:, : span.start], values[:, : span.start]))
            mixed = self._merged(grouped, k, v, seen)
        out.view(count, shape.kv_heads, shape.group, shape.head_dim).copy_(mixed.permute(2, 0, 1, 3))

    def _causal(self, q: torch.Tensor, seen: list[tuple[torch.Tensor, torch.Tensor]], before: int) -> torch.Tensor:
        """Output [K, G, n, d] over all keys at once. Kernels align rows and columns at the first, so that as many rows
        as there are keys `before` are computed in vain: for a few, cheaper than a product of their own and a merge."""
        group = self._shape.group
        keys, values = (
            seen[0] if len(seen) == 1 else (torch.cat([k for k, _ in seen], 1), torch.cat([v for _, v in seen], 1))
        )
        rows = functional.pad(q, (0, 0, before, 0)) if before else q
        return self._partial(rows, _spread(keys, group), _spread(values, group), True, None)[0][:, :, before:]

    def _merged(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> torch.Tensor:
        """Output [K, G, n, d] over the span itself, causally, and over what comes before."""
        group = self._shape.group
        merged = self._partial(q, _spread(k, group), _spread(v, group), True, None)
        for keys, values in seen:
            merged = merge(merged, self._partial(q, _spread(keys, group), _spread(values, group), False, None))
        return merged[0]

    def _attend_suffixes(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        shape, plan = self._shape, self._plan
        keys, values = self._pool.flat(layer)
        keys.index_copy_(0, plan.suffix_rows, k.reshape(-1, shape.head_dim))
        values.index_copy_(0, plan.suffix_rows, v.reshape(-1, shape.head_dim))
        q = q.reshape(q.shape[0], shape.kv_heads, shape.group, shape.head_dim)
        shared = self._shared(layer, q) if plan.shared else None
        if len(plan.suffixes) == 1 and isinstance(plan.suffixes[0].tokens, slice):
            return self._suffix(plan.suffixes[0], layer, q, shared).reshape(q.shape[0], -1)
        out = torch.empty_like(q)
        for batch in plan.suffixes:
            out[batch.tokens] = self._suffix(batch, layer, q, shared)
        return out.view(q.shape[0], -1)

    def _shared(self, layer: int, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [T, K, G, d] and log-sum-exp [T, K, G, 1] over the shared spans: for each, one product for all tokens
        that see it. Tokens that see none have -inf."""
        shape, spans = self._shape, self._plan.shared
        count, heads, group, size = q.shape
        # head-major: the tokens that see a span are rows of one matrix per key-value head
        rows = q.transpose(0, 1).reshape(1, heads, count * group, size)
        seen_by_all = len(spans) == 1 and spans[0].end - spans[0].begin == count
        if seen_by_all:
            out, lse = self._partial(rows, *spans[0].seen(layer), False, spans[0].mask)
        else:
            out, lse = torch.zeros_like(rows), rows.new_full(rows.shape[:-1], -torch.inf, dtype=torch.float32)
        for span in () if seen_by_all else spans:
            at = slice(span.begin * shape.group, span.end * shape.group)
            done = self._partial(rows[:, :, at], *span.seen(layer), False, span.mask)
            out[:, :, at], lse[:, :, at] = done if span.first else merge((out[:, :, at], lse[:, :, at]), done)
        out, lse = out.reshape(heads, count, group, size), lse.reshape(heads, count, group, 1)
        return out.transpose(0, 1), lse.transpose(0, 1)

    def _suffix(
        self, batch: SuffixBatch, layer: int, q: torch.Tensor, shared: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        """Output [tokens, K, G, d] over the suffixes and what is shared, which enters the softmax as one more key whose
        score is its log-sum-exp and whose value is its output."""
        keys, values = self._pool.class_view(layer, batch.capacity)
        keys, values = keys[batch.slots, :, : batch.length], values[batch.slots, :, : batch.length]
        scores = products(_padded(q, batch), keys)
        scores = capped(scores.mul_(q.shape[-1] ** -0.5), self._softcap).add_(batch.mask)  # [b, K, n * G, length]
        if shared is None:
            return _unpadded(torch.matmul(scores.softmax(-1).to(q.dtype), values), batch, q)
        weights = torch.cat([scores, _padded(shared[1], batch)], dim=-1).softmax(-1).to(q.dtype)
        out = torch.matmul(weights[..., : batch.length], values)
        return _unpadded(out.addcmul_(weights[..., batch.length :], _padded(shared[0], batch)), batch, q)


def _padded(x: torch.Tensor, batch: SuffixBatch) -> torch.Tensor:
    """[T, K, G, d] of all suffix tokens -> [b, K, n * G, d] of a batch's places."""
    if batch.gather is not None:
        x = x.index_select(0, batch.gather)
    if x.shape[0] == batch.batch:
        return x
    return x.view(batch.batch, -1, *x.shape[1:]).transpose(1, 2).flatten(2, 3)


def _unpadded(x: torch.Tensor, batch: SuffixBatch, q: torch.Tensor) -> torch.Tensor:
    """[b, K, n * G, d] of a batch's places -> [tokens, K, G, d] of the tokens it answers for."""
    if x.shape[2] != q.shape[2]:
        x = x.view(*x.shape[:2], -1, *q.shape[2:]).transpose(1, 2).flatten(0, 1)
    return x if batch.scatter is None else x.index_select(0, batch.scatter)


def products(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """q k^T in float32, [..., n, L] of q [..., n, d] and k [..., L, d]. Products of half precision are rounded to it
    where nothing else is asked for: keys with large biases, such as Qwen2's, then differ by less than what is lost."""
    if q.dtype == torch.float32:
        return torch.matmul(q, k.transpose(-1, -2))
    if q.device.type == "cuda":
        k = k.expand(*q.shape[:-2], *k.shape[-2:])
        flat = torch.bmm(q.flatten(0, -3), k.flatten(0, -3).transpose(-1, -2), out_dtype=torch.float32)
        return flat.view(*q.shape[:-1], k.shape[-2])
    return torch.matmul(q.float(), k.float().transpose(-1, -2))


def merge(
    one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two disjoint sets of keys from that over each: outputs [..., d] and log-sum-exps [...]."""
    weight = torch.sigmoid(other[1] - one[1]).unsqueeze(-1)
    out = torch.lerp(one[0].float(), other[0].float(), weight).to(one[0].dtype)
    return out, torch.logaddexp(one[1], other[1])


def _spread(x: torch.Tensor, group: int) -> torch.Tensor:
    """[K, L, d] seen as [K, G, L, d] without a copy."""
    return x.unsqueeze(1).expand(-1, group, -1, -1)


Partial = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, bool, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]
]


def partial_attention_for(device: torch.device, dtype: torch.dtype, softcap: float | None = None) -> Partial:
    """(q [b, h, n, d], k, v [b, h, L, d], causal, mask [n, L] to be added or None) -> output and log-sum-exp [b, h, n]
    in float32."""
    if softcap is not None:
        return partial(plain_attention, softcap=softcap)
    if device.type == "cpu":
        return _cpu_flash
    if device.type == "cuda" and dtype != torch.float32 and torch.cuda.get_device_capability(device) >= FLASH_FROM:
        return _cuda_flash
    return plain_attention


def _cpu_flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask)
    return out, lse


def _cuda_flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if mask is not None:
        return plain_attention(q, k, v, causal, mask)
    result = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
    return result[0], result[1]


def plain_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    mask: torch.Tensor | None = None,
    *,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by plain matrix products, on any device, so many rows at a time that few scores are held at once."""
    rows, keys = q.shape[-2], k.shape[-2]
    step = max(1, _SCORES // (math.prod(q.shape[:-2]) * keys))
    if rows <= step:
        return _plain_rows(q, k, v, 0 if causal else None, mask, softcap)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
    for begin in range(0, rows, step):
        part = slice(begin, min(begin + step, rows))
        seen = slice(0, part.stop) if causal else slice(0, keys)
        of_part = None if mask is None else mask[part, seen]
        first = begin if causal else None
        done = _plain_rows(q[..., part, :], k[..., seen, :], v[..., seen, :], first, of_part, softcap)
        out[..., part, :], lse[..., part] = done
    return out, lse


def _plain_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: int | None, mask: torch.Tensor | None, cap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`first`: the number of the first row, which sees so many keys before its own; None: all see all."""
    scores = capped(products(q, k) * q.shape[-1] ** -0.5, cap)
    if first is not None:
        scores += scores.new_full(scores.shape[-2:], -torch.inf).triu_(1 + first)
    if mask is not None:
        scores += mask
    lse = scores.logsumexp(-1)
    return torch.matmul(torch.exp(scores - lse.unsqueeze(-1)).to(v.dtype), v), lse
