"""What the kernels are told of a step, the same for every layer: int64 arrays, see `table.Field`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from lm_service.engine.packed.prefix_cache.tree import Node
from lookonce.models.kernels.attention.heads import Heads
from lookonce.models.kernels.attention.table import Item, Part
from lookonce.models.kernels.program import Ints
from lookonce.models.text_adapter import ModelShape

_CHUNK = 512  # keys of a stretch that one piece of work looks at, about; never depends on who looks
_ROOM = 16 << 20  # float32 that the pieces of a wave leave behind, at most

_NOTHING: Ints = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class PrefixSpan:
    """A filled prefix stretch, seen by tail tokens [begin, end)."""

    node: Node
    begin: int
    end: int


@dataclass(frozen=True)
class Suffixes:
    """The step's tail tokens."""

    rows: Ints  # [T, kv_heads] where keys and values are stored in the pool
    visible: Ints  # [T] keys of its own tail that a token may see
    mask_rows: Ints  # [T] row of `masks`, or -1
    masks: npt.NDArray[np.bool_]  # [rows, longest], a byte each


@dataclass(frozen=True)
class Split:
    """Tail tokens [begin, end) and the work of `look` for them."""

    begin: int
    end: int
    stretches: list[PrefixSpan]  # of those tokens
    items: Ints  # [pieces, len(Item)]
    parts: Ints  # [stretches, len(Part)]
    partial: int  # float32 that its pieces leave behind


@dataclass(frozen=True)
class NativePlan:
    """A step's tails, in waves whose partial results find room at once."""

    suffixes: Suffixes
    waves: list[Split]
    seen: Ints  # [T + 1]: token t sees the stretches seen_parts[seen[t] : seen[t + 1]] of its wave
    seen_parts: Ints


def native_plan(stretches: Sequence[PrefixSpan], suffixes: Suffixes, heads: Heads, room: int = _ROOM) -> NativePlan:
    """Cut a step into waves that leave about `room` float32 behind at most (or one token's)."""
    tokens = len(suffixes.visible)
    chunks = [_chunks(stretch) for stretch in stretches]
    each = np.zeros(tokens + 1, dtype=np.int64)  # chunks that a token looks at
    for stretch, count in zip(stretches, chunks, strict=True):
        each[stretch.begin] += count
        each[stretch.end] -= count
    used = (each.cumsum()[:tokens] * (heads.kv_heads * heads.group * (heads.size + 2))).cumsum()
    waves, begin = [], 0
    while begin < tokens:
        before = int(used[begin - 1]) if begin else 0
        end = max(begin + 1, int(np.searchsorted(used, before + room, side="right")))
        waves.append(_split(stretches, begin, end, heads))
        begin = end
    return NativePlan(suffixes, waves, *_seen(waves, tokens))


def tensor_fields(*tensors: torch.Tensor) -> list[int]:
    """For each where it begins, and how far its tokens are apart."""
    return [number for tensor in tensors for number in (tensor.data_ptr(), tensor.stride(0))]


def node_table(nodes: Sequence[Node], shape: ModelShape) -> Ints:
    """int64 [layers, nodes, 3]: addresses of keys and values, and how far heads are apart."""
    table = np.zeros((shape.layers, len(nodes), 3), dtype=np.int64)
    layers = np.arange(shape.layers)
    for number, node in enumerate(nodes):
        (kv,) = node.kv.parts  # [layers, 2, kv_heads, T, d]
        size = kv.element_size()
        table[:, number, 0] = kv.data_ptr() + layers * (kv.stride(0) * size)
        table[:, number, 1] = table[:, number, 0] + kv.stride(1) * size
        table[:, number, 2] = kv.stride(2)
    return table


def _chunks(stretch: PrefixSpan) -> int:
    return -(-stretch.node.length // _CHUNK)


def _within(stretches: Sequence[PrefixSpan], begin: int, end: int) -> list[PrefixSpan]:
    """What the tokens [begin, end) see."""
    return [
        PrefixSpan(stretch.node, max(stretch.begin, begin), min(stretch.end, end))
        for stretch in stretches
        if stretch.begin < end and stretch.end > begin
    ]


def _split(stretches: Sequence[PrefixSpan], begin: int, end: int, heads: Heads) -> Split:
    """Cut what is looked at into pieces: for each stretch and head, chunks of keys, and in each blocks of rows."""
    inside = _within(stretches, begin, end)
    items: list[Ints] = [np.empty((0, len(Item)), dtype=np.int64)]
    parts = np.zeros((len(inside), len(Part)), dtype=np.int64)
    place = 0
    for number, stretch in enumerate(inside):
        first, count = stretch.begin * heads.group, (stretch.end - stretch.begin) * heads.group
        height = min(heads.block, -(-count // heads.lanes) * heads.lanes)
        chunks, blocks = _chunks(stretch), -(-count // height)
        parts[number] = first, place, chunks, blocks, height
        pieces = np.empty((heads.kv_heads, chunks, blocks, len(Item)), dtype=np.int64)
        bounds = np.arange(chunks + 1) * stretch.node.length // chunks
        offsets = np.arange(blocks) * height
        pieces[..., Item.PART] = number
        pieces[..., Item.HEAD] = np.arange(heads.kv_heads)[:, None, None]
        pieces[..., Item.ROW] = first + offsets
        pieces[..., Item.ROWS] = np.minimum(height, count - offsets)
        pieces[..., Item.BEGIN] = bounds[:-1, None]
        pieces[..., Item.END] = bounds[1:, None]
        pieces[..., Item.HEIGHT] = height
        items.append(pieces.reshape(-1, len(Item)))
        items[-1][:, Item.PLACE] = place + np.arange(len(items[-1])) * (height * (heads.size + 2))
        place += len(items[-1]) * height * (heads.size + 2)
    return Split(begin, end, inside, np.concatenate(items), parts, place)


def _seen(waves: list[Split], tokens: int) -> tuple[Ints, Ints]:
    """For each token the stretches it sees, in their order: offsets, and numbers within its wave."""
    token, number = [_NOTHING], [_NOTHING]
    for wave in waves:
        for at, stretch in enumerate(wave.stretches):
            token.append(np.arange(stretch.begin, stretch.end))
            number.append(np.full(stretch.end - stretch.begin, at))
    tokens_, numbers = np.concatenate(token), np.concatenate(number)
    offsets = np.zeros(tokens + 1, dtype=np.int64)
    np.add.at(offsets, tokens_ + 1, 1)
    return offsets.cumsum(), numbers[np.argsort(tokens_, kind="stable")]
