"""From a batch to tensors: the order of its tokens, and who sees which keys.

Prefills come first, then suffixes sorted by the path of their shared prefixes: all tokens that see a prefix are
neighbours.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from lm_service.engine.packed.execution.attention import AttentionPlan, PrefillSpan, SharedSpan, SuffixBatch
from lm_service.engine.packed.prefix_cache.pool import SuffixPool
from lm_service.engine.packed.scheduling.batch import Batch, PrefillChunk, SuffixChunk
from lookonce.models.text_adapter import ModelShape

_SPARSE = 2  # slots are read in place unless more than every second one would be read in vain
_FAR = 16  # slots further apart than this are not read together
_WIDTHS = 64  # more than there are width classes


@dataclass(frozen=True)
class Members:
    """Some of a step's suffixes, one a place of each array: int64 [n]."""

    number: npt.NDArray[np.int64]  # which of the batch's suffixes
    capacity: npt.NDArray[np.int64]  # of its slot
    place: npt.NDArray[np.int64]  # of its slot in the pool's `class_view`
    start: npt.NDArray[np.int64]  # tokens in its slot already
    count: npt.NDArray[np.int64]  # new tokens
    begin: npt.NDArray[np.int64]  # its first token among the step's suffix tokens

    def __getitem__(self, which: slice | npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> Members:
        held = (self.number, self.capacity, self.place, self.start, self.count, self.begin)
        return Members(*(array[which] for array in held))

    def within(self) -> npt.NDArray[np.int64]:
        """Each suffix token's place among those of its chunk, int64 [suffix tokens]."""
        places: npt.NDArray[np.int64] = np.arange(self.count.sum()) - np.repeat(self.begin, self.count)
        return places


def suffix_order(chunk: SuffixChunk) -> tuple[tuple[int, ...], int, int]:
    """Sort key: shared prefixes first, then where the suffix lies."""
    slot = chunk.sequence.slot
    if chunk.sequence.owner is not None:
        return (chunk.sequence.order, 0, chunk.sequence.index)  # the same order wherever the suffixes lie
    return (chunk.sequence.order, 0, 0) if slot is None else (chunk.sequence.order, slot.slab, slot.index)


def make_plan(shape: ModelShape, pool: SuffixPool, batch: Batch) -> AttentionPlan:
    """The plan of a batch whose suffixes are in `suffix_order`, for torch's operations."""
    prefills = prefill_spans(batch.prefills)
    members, rows = members_of(shape, pool, batch.suffixes)
    return AttentionPlan(
        prefill_tokens=prefills[-1].end if prefills else 0,
        prefills=prefills,
        shared=shared_spans(batch.suffixes),
        suffixes=_suffix_batches(shape, batch.suffixes, members, len(rows)),
        suffix_rows=torch.from_numpy(rows.reshape(-1)).to(shape.device),
    )


def prefill_spans(chunks: list[PrefillChunk]) -> list[PrefillSpan]:
    """What a step computes of prefixes."""
    spans, begin = [], 0
    for chunk in chunks:
        node = chunk.prefill.node
        spans.append(PrefillSpan(node, begin, begin + chunk.count, node.filled, node.path()[:-1]))
        begin += chunk.count
    return spans


def shared_spans(chunks: list[SuffixChunk]) -> list[SharedSpan]:
    """What suffixes in `suffix_order` see of prefixes."""
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


def members_of(shape: ModelShape, pool: SuffixPool, chunks: list[SuffixChunk]) -> tuple[Members, npt.NDArray[np.int64]]:
    """The suffixes, and the pool row of every head of every suffix token, int64 [suffix tokens, K]."""
    known = [
        (chunk.count, slot.capacity, pool.row_of(slot), pool.place_of(slot), chunk.sequence.suffix_length)
        for chunk in chunks
        if (slot := chunk.sequence.slot) is not None
    ]
    count, capacity, row, place, start = np.array(known, dtype=np.int64).reshape(-1, 5).T
    begin = count.cumsum() - count
    members = Members(np.arange(len(chunks)), capacity, place, start, count, begin)
    tokens = np.repeat(row + start, count) + members.within()
    return members, tokens[:, None] + np.repeat(capacity, count)[:, None] * np.arange(shape.kv_heads)


def _suffix_batches(
    shape: ModelShape, chunks: list[SuffixChunk], everybody: Members, suffix_tokens: int
) -> list[SuffixBatch]:
    """The batches of suffixes."""
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


def _neighbours(chunks: list[SuffixChunk], members: Members) -> Iterator[Members]:
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
    shape: ModelShape, capacity: int, chunks: list[SuffixChunk], members: Members, suffix_tokens: int
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
        if branches(chunk):
            limit_to_branch(visible[place], chunk)

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


def branches(chunk: SuffixChunk) -> bool:
    """Whether it has tokens of a choice trie."""
    trie = chunk.sequence.trie
    return trie is not None and chunk.sequence.prompt_length - chunk.sequence.computed < chunk.count


def limit_to_branch(visible: npt.NDArray[np.bool_], chunk: SuffixChunk) -> None:
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
