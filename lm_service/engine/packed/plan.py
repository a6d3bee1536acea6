"""From a batch to tensors: the order of its tokens, and who sees which keys.

Fills come first, then tails sorted by the path of their shared prefixes: all tokens that see a prefix are neighbours.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from lm_service.engine.packed.adapter import ModelShape
from lm_service.engine.packed.attention import AttentionPlan, FillPart, SharedPart, TailPart
from lm_service.engine.packed.batch import Batch, FillChunk, TailChunk
from lm_service.engine.packed.pool import TailPool

_SPARSE = 2  # slots are read in place unless more than every second one would be read in vain
_FAR = 16  # slots further apart than this are not read together


@dataclass(frozen=True)
class _Member:
    """A tail on its way into a `TailPart`."""

    place: int  # of its slot in the pool's `class_view`
    chunk: TailChunk
    begin: int  # its first token among the step's tail tokens


def tail_order(chunk: TailChunk) -> tuple[tuple[int, ...], int, int]:
    """Sort key: shared prefixes first, then where the tail lies."""
    slot = chunk.sequence.slot
    if chunk.sequence.owner is not None:
        return (chunk.sequence.order, 0, chunk.sequence.index)  # the same order wherever the tails lie
    return (chunk.sequence.order, 0, 0) if slot is None else (chunk.sequence.order, slot.slab, slot.index)


def make_plan(shape: ModelShape, pool: TailPool, batch: Batch) -> AttentionPlan:
    """The plan of a batch whose tails are in `tail_order`."""
    fills = _fill_parts(batch.fills)
    groups: dict[tuple[int, int], list[_Member]] = defaultdict(list)
    begin = 0
    for chunk in batch.tails:
        slot = chunk.sequence.slot
        if slot is not None:
            groups[slot.capacity, _width_class(chunk.count)].append(_Member(pool.place_of(slot), chunk, begin))
        begin += chunk.count
    return AttentionPlan(
        fill_tokens=fills[-1].end if fills else 0,
        fills=fills,
        shared=_shared_parts(batch.tails),
        tails=[
            _tail_part(shape, key[0], near, begin) for key, members in groups.items() for near in _neighbours(members)
        ],
        tail_rows=_tail_rows(shape, pool, batch.tails),
    )


def _fill_parts(chunks: list[FillChunk]) -> list[FillPart]:
    parts, begin = [], 0
    for chunk in chunks:
        node = chunk.fill.node
        parts.append(FillPart(node, begin, begin + chunk.count, node.filled, node.path()[:-1]))
        begin += chunk.count
    return parts


def _shared_parts(chunks: list[TailChunk]) -> list[SharedPart]:
    found: dict[int, SharedPart] = {}
    begin = 0
    for chunk in chunks:
        end = begin + chunk.count
        for depth, node in enumerate(chunk.sequence.path):
            start = found[node.id].begin if node.id in found else begin
            found[node.id] = SharedPart(node, start, end, first=depth == 0)
        begin = end
    return list(found.values())


def _tail_rows(shape: ModelShape, pool: TailPool, chunks: list[TailChunk]) -> torch.Tensor:
    """Pool row of every head of every tail token, int64 [tail tokens * K]."""
    counts = np.array([chunk.count for chunk in chunks], dtype=np.int64)
    slots = [chunk.sequence.slot for chunk in chunks]
    first = [
        pool.row_of(slot) + chunk.sequence.tail_length
        for slot, chunk in zip(slots, chunks, strict=True)
        if slot is not None
    ]
    capacity = np.array([slot.capacity for slot in slots if slot is not None], dtype=np.int64)
    within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    tokens = np.repeat(np.array(first, dtype=np.int64), counts) + within
    rows = tokens[:, None] + np.repeat(capacity, counts)[:, None] * np.arange(shape.kv_heads)
    return torch.from_numpy(rows.reshape(-1)).to(shape.device)


def _width_class(count: int) -> int:
    """Chunks of one class are padded to the longest of them: 1; 2 to 4; 5 to 16; 17 to 64; ..."""
    return ((count - 1).bit_length() + 1) // 2


def _neighbours(members: list[_Member]) -> Iterator[list[_Member]]:
    """Members by place, cut where the next one is far away; those of a request that shares no step stay together in
    their own order, so that where they lie changes nothing."""
    if members[0].chunk.sequence.owner is not None:
        yield members
        return
    members = sorted(members, key=lambda member: member.place)
    start = 0
    for at in range(1, len(members) + 1):
        if at == len(members) or members[at].place - members[at - 1].place > _FAR:
            yield members[start:at]
            start = at


def _tail_part(shape: ModelShape, capacity: int, members: list[_Member], tail_tokens: int) -> TailPart:
    """One padded batch over neighbours; holes between their slots are computed and ignored."""
    low, high = members[0].place, members[-1].place
    alone = members[0].chunk.sequence.owner is not None
    width = max(member.chunk.count for member in members)
    in_place = not alone and high - low + 1 <= _SPARSE * len(members)
    places = [member.place - low for member in members] if in_place else list(range(len(members)))
    batch = high - low + 1 if in_place else len(members)

    starts = np.zeros(batch, dtype=np.int64)
    gather = np.zeros((batch, width), dtype=np.int64)
    tokens: list[int] = []
    scatter: list[int] = []
    for place, member in zip(places, members, strict=True):
        chunk, begin = member.chunk, member.begin
        starts[place] = chunk.sequence.tail_length
        gather[place, : chunk.count] = range(begin, begin + chunk.count)
        tokens.extend(range(begin, begin + chunk.count))
        scatter.extend(range(place * width, place * width + chunk.count))
    length = int(max(starts[place] + member.chunk.count for place, member in zip(places, members, strict=True)))
    visible = np.arange(length) <= (starts[:, None] + np.arange(width))[:, :, None]  # [b, n, length]
    for place, member in zip(places, members, strict=True):
        if member.chunk.sequence.trie is not None:
            _limit_to_branch(visible[place], member.chunk)

    device = shape.device
    as_they_come = tokens == list(range(tail_tokens))
    mask = torch.zeros(visible.shape).masked_fill_(torch.from_numpy(~visible), -torch.inf)
    if width > 1:
        mask = mask.repeat_interleave(shape.group, dim=1)
    return TailPart(
        capacity=capacity,
        length=length,
        slots=slice(low, high + 1) if in_place else torch.tensor([member.place for member in members], device=device),
        gather=None
        if as_they_come and len(tokens) == batch * width
        else torch.from_numpy(gather.reshape(-1)).to(device),
        scatter=None if len(tokens) == batch * width else torch.tensor(scatter, device=device),
        tokens=slice(0, tail_tokens) if as_they_come else torch.tensor(tokens, device=device),
        batch=batch,
        mask=mask.unsqueeze(1).to(device),
    )


def _limit_to_branch(visible: npt.NDArray[np.bool_], chunk: TailChunk) -> None:
    """Rows of a choice trie see the prompt and their own branch only."""
    sequence = chunk.sequence
    trie = sequence.trie
    first = sequence.prompt_length - sequence.computed  # row of the chunk that is the trie's place 0
    if trie is None or first >= chunk.count:
        return
    start = sequence.tail_length + first  # column of place 0
    places = slice(max(0, -first), chunk.count - first)
    branch = trie.visible()[places]
    columns = min(branch.shape[1], visible.shape[1] - start)
    visible[max(0, first) : chunk.count, start : start + columns] = branch[:, :columns]
