"""From a batch to tensors: the order of its tokens, and who sees which keys.

Prefills come first, then suffixes sorted by the path of their shared prefixes: all tokens that see a prefix are
neighbours.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from lm_service.engine.packed.execution.attention import AttentionPlan, PrefillSpan, SharedSpan, SuffixBatch
from lm_service.engine.packed.execution.sight import sight_of
from lm_service.engine.packed.prefix_cache.pool import SuffixPool
from lm_service.engine.packed.scheduling.batch import Batch, PrefillChunk, SuffixChunk
from lookonce.models.text_adapter import AttentionRules, BothWays, ModelShape

_SPARSE = 2  # slots are read in place unless more than every second one would be read in vain
_FAR = 16  # slots further apart than this are not read together
_WIDTHS = 64  # more than there are width classes
_LEAST = {torch.float32: -1e30, torch.bfloat16: -1e30, torch.float16: -3e4}
"""Scores of keys that are hidden: finite, since those of a token may all be so in a span."""


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


def plans_of(shape: ModelShape, pool: SuffixPool, batch: Batch) -> dict[int | None, AttentionPlan]:
    """The plan of a batch, whose suffixes are in `suffix_order`, for the layers of each window (None: without one)."""
    plans: dict[int | None, AttentionPlan] = {None: make_plan(shape, pool, batch)}
    if shape.rules is not None:
        prefixes = (chunk.prefill.node.start + chunk.prefill.node.filled + chunk.rows for chunk in batch.prefills)
        suffixes = (chunk.sequence.computed + chunk.count for chunk in batch.suffixes)
        longest = max(itertools.chain(prefixes, suffixes), default=0)
        for window in {window for window in shape.rules.windows if window is not None}:
            plans[window] = plans[None] if longest <= window else make_plan(shape, pool, batch, window)
    return plans


def make_plan(shape: ModelShape, pool: SuffixPool, batch: Batch, window: int | None = None) -> AttentionPlan:
    """The plan of a batch whose suffixes are in `suffix_order`, for torch's operations and layers of one window."""
    prefills, shared = prefill_spans(batch.prefills), shared_spans(batch.suffixes)
    if shape.rules is not None:
        prefills = [
            _seeing(shape, shape.rules, span, chunk, window)
            for span, chunk in zip(prefills, batch.prefills, strict=True)
        ]
    if shape.rules is not None and window is not None:
        shared = _within(shape, shared, _first_seen(shape.rules, batch.suffixes, window))
    members, rows = members_of(shape, pool, batch.suffixes)
    return AttentionPlan(
        prefill_tokens=prefills[-1].end if prefills else 0,
        prefills=prefills,
        shared=shared,
        suffixes=_suffix_batches(shape, batch.suffixes, members, len(rows), window),
        suffix_rows=torch.from_numpy(rows.reshape(-1)).to(shape.device),
    )


def prefill_spans(chunks: list[PrefillChunk]) -> list[PrefillSpan]:
    """What a step computes of prefixes."""
    spans, begin = [], 0
    for chunk in chunks:
        node = chunk.prefill.node
        spans.append(PrefillSpan(node, begin, begin + chunk.rows, node.filled, node.path()[:-1]))
        begin += chunk.rows
    return spans


def _seeing(
    shape: ModelShape, rules: AttentionRules, span: PrefillSpan, chunk: PrefillChunk, window: int | None
) -> PrefillSpan:
    """The span, with what its tokens see."""
    first = span.node.start
    sight = sight_of(
        first + span.start,
        chunk.rows,
        [(first + begin, first + end) for begin, end in chunk.prefill.blocks],
        window,
        within_window=rules.within_window,
        device=shape.device,
    )
    return replace(span, sight=sight, beyond=chunk.rows - chunk.count)


def _first_seen(rules: AttentionRules, chunks: list[SuffixChunk], window: int) -> npt.NDArray[np.int64]:
    """The first token of its sequence that each suffix token sees, int64 [suffix tokens]."""
    found = [_places(chunk) + 1 - window for chunk in chunks]
    if rules.both_ways is BothWays.PROMPT and not rules.within_window:
        for chunk, first in zip(chunks, found, strict=True):
            first[: max(0, chunk.sequence.prompt_length - chunk.sequence.computed)] = 0
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


def _places(chunk: SuffixChunk) -> npt.NDArray[np.int64]:
    """The place of each of a chunk's tokens in its sequence, int64 [count]; on a choice trie, in its choice."""
    sequence = chunk.sequence
    places = np.arange(sequence.computed, sequence.computed + chunk.count)
    if branches(chunk) and sequence.trie is not None:
        at = max(0, sequence.prompt_length - sequence.computed)
        within = places[at:] - sequence.prompt_length
        places[at:] = sequence.prompt_length + sequence.trie.depths[within]
    return places


def _within(shape: ModelShape, spans: list[SharedSpan], first_seen: npt.NDArray[np.int64]) -> list[SharedSpan]:
    """The spans as far as a window shows them: a token with a key hidden in a span has a score there that no softmax
    tells from nothing."""
    found: list[SharedSpan] = []
    written = np.zeros(len(first_seen), dtype=np.bool_)
    for span in spans:
        at, node = slice(span.begin, span.end), span.node
        since = np.clip(first_seen[at] - node.start, 0, node.length)
        start = int(since.min())
        if start == node.length:
            continue
        mask = None
        if since.max() > start:
            hidden = np.arange(start, node.length) < since[:, None]
            added = torch.zeros(hidden.shape).masked_fill_(torch.from_numpy(hidden), _LEAST[shape.dtype])
            mask = added.repeat_interleave(shape.group, dim=0).to(shape.device, shape.dtype)
        found.append(replace(span, first=not written[span.begin], start=start, mask=mask))
        written[at] = True
    return found


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
    shape: ModelShape, chunks: list[SuffixChunk], everybody: Members, suffix_tokens: int, window: int | None
) -> list[SuffixBatch]:
    """The batches of suffixes."""
    classes = everybody.capacity * _WIDTHS + _width_class(everybody.count)
    return [
        _suffix_batch(
            shape, int(key) // _WIDTHS, [chunks[number] for number in near.number], near, suffix_tokens, window
        )
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
    shape: ModelShape,
    capacity: int,
    chunks: list[SuffixChunk],
    members: Members,
    suffix_tokens: int,
    window: int | None,
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
        if window is not None and window < length:
            _limit_to_window(visible[place], chunk, window)

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


def _limit_to_window(visible: npt.NDArray[np.bool_], chunk: SuffixChunk, window: int) -> None:
    """Rows see those columns only that a window shows: they count from the first token that is in no prefix."""
    first = chunk.sequence.leaf_end
    columns = np.arange(visible.shape[1])
    since = _places(chunk) - first + 1 - window
    trie, own = chunk.sequence.trie, chunk.sequence.prompt_length - first
    if trie is not None and own < len(columns):
        tail = trie.depths[: len(columns) - own]
        columns[own : own + len(tail)] = own + tail
    visible[: chunk.count] &= columns >= since[:, None]
