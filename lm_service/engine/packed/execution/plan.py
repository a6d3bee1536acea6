"""From a batch to tensors: the order of its tokens, and who sees which keys.

Fills come first, then tails sorted by the path of their shared prefixes: all tokens that see a prefix are neighbours.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from lm_service.engine.packed.execution.attention import AttentionPlan, PrefillSpan, SharedSpan, SuffixBatch
from lm_service.engine.packed.execution.batch import Batch, PrefillChunk, SuffixChunk
from lm_service.engine.packed.execution.kernel_plan import Suffixes, native_plan
from lm_service.engine.packed.prefix_cache.pool import SuffixPool
from lookonce.models.kernels.attention.kernels import Kernels
from lookonce.models.text_adapter import ModelShape

_SPARSE = 2  # slots are read in place unless more than every second one would be read in vain
_FAR = 16  # slots further apart than this are not read together
_WIDTHS = 64  # more than there are width classes


@dataclass(frozen=True)
class _Members:
    """Some of a step's tails, one a place of each array: int64 [n]."""

    number: npt.NDArray[np.int64]  # which of the batch's tails
    capacity: npt.NDArray[np.int64]  # of its slot
    place: npt.NDArray[np.int64]  # of its slot in the pool's `class_view`
    start: npt.NDArray[np.int64]  # tokens in its slot already
    count: npt.NDArray[np.int64]  # new tokens
    begin: npt.NDArray[np.int64]  # its first token among the step's tail tokens

    def __getitem__(self, which: slice | npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> _Members:
        held = (self.number, self.capacity, self.place, self.start, self.count, self.begin)
        return _Members(*(array[which] for array in held))


def suffix_order(chunk: SuffixChunk) -> tuple[tuple[int, ...], int, int]:
    """Sort key: shared prefixes first, then where the tail lies."""
    slot = chunk.sequence.slot
    if chunk.sequence.owner is not None:
        return (chunk.sequence.order, 0, chunk.sequence.index)  # the same order wherever the tails lie
    return (chunk.sequence.order, 0, 0) if slot is None else (chunk.sequence.order, slot.slab, slot.index)


def make_plan(shape: ModelShape, pool: SuffixPool, batch: Batch, kernels: Kernels | None = None) -> AttentionPlan:
    """The plan of a batch whose tails are in `suffix_order`; with `kernels`, one for them."""
    prefills = _prefill_spans(batch.prefills)
    shared, members, rows = _shared_parts(batch.suffixes), *_members(shape, pool, batch.suffixes)
    plan = AttentionPlan(prefills[-1].end if prefills else 0, prefills, shared)
    if kernels is not None and batch.suffixes:
        return replace(plan, native=native_plan(shared, _native_suffixes(batch.suffixes, members, rows), kernels.heads))
    suffix_rows = torch.from_numpy(rows.reshape(-1)).to(shape.device)
    return replace(plan, suffixes=_suffix_batches(shape, batch.suffixes, members, len(rows)), suffix_rows=suffix_rows)


def _prefill_spans(chunks: list[PrefillChunk]) -> list[PrefillSpan]:
    parts, begin = [], 0
    for chunk in chunks:
        node = chunk.prefill.node
        parts.append(PrefillSpan(node, begin, begin + chunk.count, node.filled, node.path()[:-1]))
        begin += chunk.count
    return parts


def _shared_parts(chunks: list[SuffixChunk]) -> list[SharedSpan]:
    found: dict[int, SharedSpan] = {}
    begin = 0
    for _, alike in itertools.groupby(chunks, lambda chunk: chunk.sequence.order):
        group = list(alike)
        end = begin + sum(chunk.count for chunk in group)
        for depth, node in enumerate(group[0].sequence.path):
            start = found[node.id].begin if node.id in found else begin
            found[node.id] = SharedSpan(node, start, end, first=depth == 0)
        begin = end
    return list(found.values())


def _members(shape: ModelShape, pool: SuffixPool, chunks: list[SuffixChunk]) -> tuple[_Members, npt.NDArray[np.int64]]:
    """The tails, and the pool row of every head of every tail token, int64 [tail tokens, K]."""
    known = [
        (chunk.count, slot.capacity, pool.row_of(slot), pool.place_of(slot), chunk.sequence.suffix_length)
        for chunk in chunks
        if (slot := chunk.sequence.slot) is not None
    ]
    count, capacity, row, place, start = np.array(known, dtype=np.int64).reshape(-1, 5).T
    begin = count.cumsum() - count
    members = _Members(np.arange(len(chunks)), capacity, place, start, count, begin)
    tokens = np.repeat(row + start, count) + _within(members)
    return members, tokens[:, None] + np.repeat(capacity, count)[:, None] * np.arange(shape.kv_heads)


def _within(members: _Members) -> npt.NDArray[np.int64]:
    """Each tail token's place among those of its chunk, int64 [tail tokens]."""
    within: npt.NDArray[np.int64] = np.arange(members.count.sum()) - np.repeat(members.begin, members.count)
    return within


def _native_suffixes(chunks: list[SuffixChunk], members: _Members, rows: npt.NDArray[np.int64]) -> Suffixes:
    visible = np.repeat(members.start, members.count) + _within(members) + 1
    mask_rows, masks = np.full(len(rows), -1), []
    limited = 0
    for number, chunk in enumerate(chunks):
        if not _branches(chunk):
            continue
        begin, seen = int(members.begin[number]), visible[members.begin[number] :][: chunk.count]
        masks.append(np.arange(seen[-1]) < seen[:, None])
        _limit_to_branch(masks[-1], chunk)
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


def _suffix_batches(
    shape: ModelShape, chunks: list[SuffixChunk], everybody: _Members, suffix_tokens: int
) -> list[SuffixBatch]:
    """The batches of tails."""
    classes = everybody.capacity * _WIDTHS + _width_class(everybody.count)
    return [
        _suffix_batch(shape, int(key) // _WIDTHS, [chunks[number] for number in near.number], near, suffix_tokens)
        for key in (classes[:1] if (classes == classes[:1]).all() else np.unique(classes))
        for near in _neighbours(chunks, everybody[classes == key])
    ]


def _width_class(count: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Chunks of one class are padded to the longest of them: 1; 2 to 4; 5 to 16; 17 to 64; ..."""
    bits = np.frexp(count - 1)[1]  # frexp's exponent is the bit length
    return (bits.astype(np.int64) + 1) // 2


def _neighbours(chunks: list[SuffixChunk], members: _Members) -> Iterator[_Members]:
    """Members by place, cut where the next one is far away; those of a request that shares no step stay together in
    their own order, so that where they lie changes nothing."""
    if chunks[int(members.number[0])].sequence.owner is not None:
        yield members
        return
    members = members[np.argsort(members.place, kind="stable")]
    cuts = [0, *(np.flatnonzero(np.diff(members.place) > _FAR) + 1).tolist(), len(members.place)]
    for start, end in itertools.pairwise(cuts):
        yield members[start:end]


def _suffix_batch(
    shape: ModelShape, capacity: int, chunks: list[SuffixChunk], members: _Members, suffix_tokens: int
) -> SuffixBatch:
    """One padded batch over neighbours; holes between their slots are computed and ignored."""
    size, width, low = len(chunks), int(members.count.max()), int(members.place[0])
    span = int(members.place[-1]) - low + 1
    in_place = chunks[0].sequence.owner is None and span <= _SPARSE * size
    places = members.place - low if in_place else np.arange(size)
    batch = span if in_place else size

    starts = np.zeros(batch, dtype=np.int64)
    starts[places] = members.start
    steps = np.arange(width)
    held = steps < members.count[:, None]  # [n, width]: which places of the batch are tokens
    tokens = (members.begin[:, None] + steps)[held]
    scatter = (places[:, None] * width + steps)[held]
    length = int((members.start + members.count).max())
    visible = np.arange(length) <= (starts[:, None] + steps)[:, :, None]  # [b, n, length]
    for place, chunk in zip(places, chunks, strict=True):
        if _branches(chunk):
            _limit_to_branch(visible[place], chunk)

    device = shape.device
    as_they_come = len(tokens) == suffix_tokens and bool((tokens == np.arange(suffix_tokens)).all())
    full = len(tokens) == batch * width
    gather = None
    if not (as_they_come and full):
        gather = np.zeros(batch * width, dtype=np.int64)
        gather[scatter] = tokens
    mask = torch.zeros(visible.shape).masked_fill_(torch.from_numpy(~visible), -torch.inf)
    if width > 1:
        mask = mask.repeat_interleave(shape.group, dim=1)
    return SuffixBatch(
        capacity=capacity,
        length=length,
        slots=slice(low, low + span) if in_place else torch.from_numpy(members.place.copy()).to(device),
        gather=None if gather is None else torch.from_numpy(gather).to(device),
        scatter=None if full else torch.from_numpy(scatter).to(device),
        tokens=slice(0, suffix_tokens) if as_they_come else torch.from_numpy(tokens).to(device),
        batch=batch,
        mask=mask.unsqueeze(1).to(device),
    )


def _branches(chunk: SuffixChunk) -> bool:
    """Whether it has tokens of a choice trie."""
    trie = chunk.sequence.trie
    return trie is not None and chunk.sequence.prompt_length - chunk.sequence.computed < chunk.count


def _limit_to_branch(visible: npt.NDArray[np.bool_], chunk: SuffixChunk) -> None:
    """Rows of a choice trie see the prompt and their own branch only."""
    sequence = chunk.sequence
    trie = sequence.trie
    first = sequence.prompt_length - sequence.computed  # row of the chunk that is the trie's place 0
    if trie is None:
        return
    start = sequence.suffix_length + first  # column of place 0
    places = slice(max(0, -first), chunk.count - first)
    branch = trie.visible[places]
    columns = min(branch.shape[1], visible.shape[1] - start)
    visible[max(0, first) : chunk.count, start : start + columns] = branch[:, :columns]
