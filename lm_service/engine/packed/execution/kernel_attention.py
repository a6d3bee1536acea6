"""Attention of a step's tokens by compiled kernels: what they are to do, the same for every layer, and the calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch

from lm_service.engine.packed.execution.attention import PrefillSpan, SharedSpan
from lm_service.engine.packed.execution.plan import (
    Members,
    branches,
    limit_to_branch,
    members_of,
    prefill_spans,
    shared_spans,
)
from lm_service.engine.packed.prefix_cache.pool import KV, SuffixPool
from lm_service.engine.packed.prefix_cache.tree import Node
from lm_service.engine.packed.scheduling.batch import Batch, SuffixChunk
from lookonce.models.kernels.attention.step_structs import (
    Heads,
    KVSpan,
    PrefillAttention,
    PrefillItem,
    PrefillPlace,
    SharedItem,
    SharedSplit,
    SuffixAttention,
)
from lookonce.models.kernels.structs import Along, Ints, Structs, calls_of, joined
from lookonce.models.text_adapter import ModelShape

if TYPE_CHECKING:
    from lookonce.models.kernels.attention.step_kernels import AttentionKernels

_CHUNK = 512  # keys of a span that one work item attends to, about; never depends on whose queries they are
_ROOM = 16 << 20  # float32 that the work items of a split leave behind, at most


@dataclass(frozen=True)
class Suffixes:
    """The step's suffix tokens."""

    rows: Ints  # [T, kv_heads] where keys and values are stored in the pool
    visible: Ints  # [T] keys of its own suffix that a token may see
    mask_rows: Ints  # [T] row of `masks`, or -1
    masks: npt.NDArray[np.bool_]  # [rows, longest], a byte each


@dataclass(frozen=True)
class Split:
    """Suffix tokens [begin, end) and the work of `attend_shared` for them."""

    begin: int
    end: int
    spans: list[SharedSpan]  # of those tokens
    items: Structs  # SharedItem [n]
    splits: Structs  # SharedSplit [spans]
    partial: int  # float32 that its work items leave behind


@dataclass(frozen=True)
class SuffixPlan:
    """A step's suffixes, in splits whose partial results find room at once."""

    suffixes: Suffixes
    splits: list[Split]
    seen: Ints  # [T + 1]: token t sees the spans seen_spans[seen[t] : seen[t + 1]] of its split
    seen_spans: Ints


@dataclass(frozen=True)
class PrefillPlan:
    """A step's prefills: the step's first tokens, in this order."""

    spans: list[PrefillSpan]
    items: Structs  # PrefillItem [n]
    places: Structs  # PrefillPlace [tokens]


def plan_batch(
    shape: ModelShape, pool: SuffixPool, batch: Batch, heads: Heads
) -> tuple[PrefillPlan | None, SuffixPlan | None]:
    """What a batch, whose suffixes are in `suffix_order`, holds of both."""
    prefills = plan_prefills(prefill_spans(batch.prefills), heads) if batch.prefills else None
    if not batch.suffixes:
        return prefills, None
    suffixes = _suffixes(batch.suffixes, *members_of(shape, pool, batch.suffixes))
    return prefills, plan_suffixes(shared_spans(batch.suffixes), suffixes, heads)


def plan_prefills(spans: list[PrefillSpan], heads: Heads) -> PrefillPlan:
    """Cut prefills into blocks. A span's ancestors and its own node come one behind the other."""
    own = np.cumsum([len(span.ancestors) + 1 for span in spans]) - 1
    items = [item for number, span in enumerate(spans) for item in _blocks(span, int(own[number]), heads.block_tokens)]
    items.sort(key=lambda item: -item[3])  # those with the most keys first
    blocks = np.repeat(np.array(items, dtype=PrefillItem.dtype), heads.kv_heads)
    blocks["head"] = np.tile(np.arange(heads.kv_heads), len(items))
    counts = [span.end - span.begin for span in spans]
    places = PrefillPlace.zeros(sum(counts))
    places["span"] = np.repeat(own, counts)
    places["place"] = np.concatenate([np.arange(span.end - span.begin) + span.start for span in spans])
    return PrefillPlan(spans, blocks, places)


def plan_suffixes(spans: Sequence[SharedSpan], suffixes: Suffixes, heads: Heads) -> SuffixPlan:
    """Split a step so that each split leaves about _ROOM float32 behind at most (or one token's)."""
    tokens = len(suffixes.visible)
    each = np.zeros(tokens + 1, dtype=np.int64)  # chunks that a token sees
    for span in spans:
        each[span.begin] += _chunks(span)
        each[span.end] -= _chunks(span)
    used = (each.cumsum()[:tokens] * (heads.kv_heads * heads.group * (heads.size + 2))).cumsum()
    splits: list[Split] = []
    begin = 0
    while begin < tokens:
        before = int(used[begin - 1]) if begin else 0
        end = max(begin + 1, int(np.searchsorted(used, before + _ROOM, side="right")))
        splits.append(_split(spans, begin, end, heads))
        begin = end
    return SuffixPlan(suffixes, splits, *_seen(splits, tokens))


def _blocks(span: PrefillSpan, own: int, height: int) -> Iterator[tuple[int, ...]]:
    """Its blocks, for one head: what a PrefillItem holds."""
    place, end = span.start, span.start + span.end - span.begin
    while place < end:
        border = min(end, place - place % height + height)
        yield 0, span.begin + place - span.start, border - place, place, own - len(span.ancestors), own
        place = border


def _chunks(span: SharedSpan) -> int:
    return -(-span.node.length // _CHUNK)


def _split(spans: Sequence[SharedSpan], begin: int, end: int, heads: Heads) -> Split:
    """Cut what tokens [begin, end) see into work items: for each span and head, chunks of keys, and in each blocks of
    rows."""
    inside = [
        SharedSpan(span.node, max(span.begin, begin), min(span.end, end), span.first)
        for span in spans
        if span.begin < end and span.end > begin
    ]
    items, splits, place = [SharedItem.zeros(0)], SharedSplit.zeros(len(inside)), 0
    for number, span in enumerate(inside):
        first, count = span.begin * heads.group, (span.end - span.begin) * heads.group
        height = min(heads.block, -(-count // heads.lanes) * heads.lanes)
        chunks, blocks = _chunks(span), -(-count // height)
        splits[number] = first, place, chunks, blocks, height
        bounds = np.arange(chunks + 1) * span.node.length // chunks
        offsets = np.arange(blocks) * height
        cut = SharedItem.zeros(heads.kv_heads, chunks, blocks)
        cut["span"], cut["height"] = number, height
        cut["head"] = np.arange(heads.kv_heads)[:, None, None]
        cut["row"], cut["rows"] = first + offsets, np.minimum(height, count - offsets)
        cut["begin"], cut["end"] = bounds[:-1, None], bounds[1:, None]
        items.append(cut.reshape(-1))
        items[-1]["place"] = place + np.arange(cut.size) * (height * (heads.size + 2))
        place += cut.size * height * (heads.size + 2)
    return Split(begin, end, inside, joined(items), splits, place)


def _seen(splits: list[Split], tokens: int) -> tuple[Ints, Ints]:
    """For each token the spans it sees, in their order: offsets, and numbers within its split."""
    token, number = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    for split in splits:
        for at, span in enumerate(split.spans):
            token.append(np.arange(span.begin, span.end))
            number.append(np.full(span.end - span.begin, at))
    tokens_, numbers = np.concatenate(token), np.concatenate(number)
    offsets = np.zeros(tokens + 1, dtype=np.int64)
    np.add.at(offsets, tokens_ + 1, 1)
    return offsets.cumsum(), numbers[np.argsort(tokens_, kind="stable")]


def _suffixes(chunks: list[SuffixChunk], members: Members, rows: Ints) -> Suffixes:
    visible = np.repeat(members.start, members.count) + members.within() + 1
    mask_rows, masks = np.full(len(rows), -1), []
    limited = 0
    for number, chunk in enumerate(chunks):
        if not branches(chunk):
            continue
        begin, seen = int(members.begin[number]), visible[members.begin[number] :][: chunk.count]
        masks.append(np.arange(seen[-1]) < seen[:, None])
        limit_to_branch(masks[-1], chunk)
        mask_rows[begin : begin + chunk.count] = limited + np.arange(chunk.count)
        limited += chunk.count
    return Suffixes(rows, visible, mask_rows, _stacked(masks))


def _stacked(tables: list[npt.NDArray[np.bool_]]) -> npt.NDArray[np.bool_]:
    """One below the other, as wide as the widest."""
    size = (sum(table.shape[0] for table in tables), max((table.shape[1] for table in tables), default=0))
    out, first = np.zeros(size, dtype=bool), 0
    for table in tables:
        out[first : first + table.shape[0], : table.shape[1]] = table
        first += table.shape[0]
    return out


_EVERY = slice(None)


class KernelAttention:
    """Makes each step's `Attend`. Memory for partial results is kept from step to step."""

    def __init__(self, kernels: AttentionKernels, shape: ModelShape, pool: SuffixPool) -> None:
        """`shape` has one stage, on the CPU."""
        self.kernels, self.shape, self.pool, self.sizes = kernels, shape, pool, kernels.heads.sizes
        (buffer,) = pool.buffers
        self.pool_keys, self.pool_values, self.pool_size = Along(buffer[:, 0]), Along(buffer[:, 1]), buffer.shape[2]
        self._partial = torch.empty(0)
        self._spans: WeakKeyDictionary[KV, Structs] = WeakKeyDictionary()

    def __call__(self, batch: Batch) -> AttendByKernels:
        """That of a batch whose suffixes are in `suffix_order`."""
        return AttendByKernels(self, *plan_batch(self.shape, self.pool, batch, self.kernels.heads))

    def partial(self, count: int) -> torch.Tensor:
        """Room for so many float32, not written yet."""
        if self._partial.numel() < count:
            self._partial = torch.empty(count)
        return self._partial

    def spans(self, nodes: Sequence[Node]) -> Structs:
        """KVSpan [layers, nodes]."""
        return joined([KVSpan.zeros(self.shape.layers, 0), *map(self._span, nodes)])

    def _span(self, node: Node) -> Structs:
        """KVSpan [layers, 1]. A KV stays where it is."""
        known = self._spans.get(node.kv)
        if known is None:
            (kv,) = node.kv.parts  # [layers, 2, kv_heads, T, d]
            tensors = {"keys": Along(kv[:, 0]), "values": Along(kv[:, 1])}
            known = KVSpan.fill(KVSpan.zeros(self.shape.layers), self.sizes, tokens=node.length, **tensors)
            known = self._spans[node.kv] = known.reshape(-1, 1)
        return known


class AttendByKernels:
    """An `Attend` of which kernels do all."""

    def __init__(self, own: KernelAttention, prefills: PrefillPlan | None, suffixes: SuffixPlan | None) -> None:
        self._kernels, self._first = own.kernels, 0 if prefills is None else len(prefills.places)
        self._prefills = None if prefills is None else _Prefills(own, prefills)
        self._suffixes = None if suffixes is None else _Suffixes(own, suffixes)

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = q.new_empty((q.shape[0], q.shape[1] * q.shape[2]))
        self._kernels.run(self.calls(q, k, v, out, slice(layer, layer + 1))[0])
        return out

    def calls(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, layers: slice = _EVERY
    ) -> Structs:
        found = []
        if self._prefills is not None:
            found.append(self._prefills.calls(q, k, v, out, layers))
        if self._suffixes is not None:
            if self._first:
                q, k, v, out = (x[self._first :] for x in (q, k, v, out))
            found.append(self._suffixes.calls(q, k, v, out, layers))
        return found[0] if len(found) == 1 else joined(found)


class _Prefills:
    """Stores new keys and values of prefixes and attends from their tokens."""

    def __init__(self, own: KernelAttention, plan: PrefillPlan) -> None:
        self._plan = plan
        self._sizes = {**own.sizes, "tokens": len(plan.places)}
        self._spans = own.spans([node for span in plan.spans for node in (*span.ancestors, span.node)])
        self._structs = PrefillAttention.fill(
            PrefillAttention.zeros(own.shape.layers),
            {"span_count": self._spans.shape[1]},
            tokens=len(plan.places),
            spans=Along(self._spans),
            item_count=len(plan.items),
            items=plan.items,
            places=plan.places,
            barrier=own.kernels.barrier(),
        )
        if own.shape.attends_last:  # nothing of a prefill is read behind the last layer's keys and values
            self._structs["item_count"][-1] = 0
        self._calls = calls_of([(own.kernels.prefill, self._structs)])

    def calls(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, layers: slice = _EVERY
    ) -> Structs:
        """See `Attend`: [layers, 1]. In the last layer `out` is not written, where that is the model's last."""
        structs = self._structs[layers]
        structs["store_counter"] = structs["attend_counter"] = 0
        PrefillAttention.fill(structs, self._sizes, query=q, key=k, value=v, out=out)
        return self._calls[layers]


class _Suffixes:
    """Stores new keys and values of suffixes and attends from their tokens."""

    def __init__(self, own: KernelAttention, plan: SuffixPlan) -> None:
        suffixes = plan.suffixes
        partial_count = max(split.partial for split in plan.splits)
        partial = own.partial(partial_count)
        self._sizes = {**own.sizes, "total": len(suffixes.visible)}
        sizes = {
            **self._sizes,
            "pool_size": own.pool_size,
            "partial_count": partial_count,
            "mask_count": len(suffixes.masks),
            "seen_places": len(suffixes.visible) + 1,
            "seen_count": int(plan.seen[-1]),
        }
        structs = SuffixAttention.fill(
            SuffixAttention.zeros(own.shape.layers),
            sizes,
            pool_keys=own.pool_keys,
            pool_values=own.pool_values,
            pool_rows=suffixes.rows,
            visible=suffixes.visible,
            mask_rows=suffixes.mask_rows,
            masks=suffixes.masks,
            mask_width=suffixes.masks.shape[1],
            seen=plan.seen,
            seen_spans=plan.seen_spans,
            partial=partial,
            barrier=own.kernels.barrier(),
        )
        self._held = [plan, partial]  # what the structs point to
        self._splits = [self._split(own, joined([structs]), split) for split in plan.splits]
        self._splits[0]["stored"] = len(suffixes.visible)
        self._calls = calls_of([(own.kernels.attend, split) for split in self._splits])

    def _split(self, own: KernelAttention, structs: Structs, split: Split) -> Structs:
        spans = own.spans([span.node for span in split.spans])
        self._held.append(spans)
        return SuffixAttention.fill(
            structs,
            {"span_count": len(split.spans)},
            item_count=len(split.items),
            begin=split.begin,
            end=split.end,
            spans=Along(spans),
            items=split.items,
            splits=split.splits,
        )

    def calls(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, layers: slice = _EVERY
    ) -> Structs:
        """See `Attend`: [layers, splits]."""
        for split in self._splits:
            structs = split[layers]
            structs["shared_counter"] = structs["own_counter"] = 0
            SuffixAttention.fill(structs, self._sizes, query=q, key=k, value=v, out=out)
        return self._calls[layers]
