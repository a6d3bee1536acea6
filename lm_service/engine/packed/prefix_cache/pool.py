"""Keys and values of neighbouring tokens, and the memory of running sequences: a buffer on each device, allocated once,
cut into slabs and those into slots of one capacity.

A slab allocator (Bonwick, 1994): the slots of a slab lie at equal distances, so that attention over all of them is one
batched product over a view. Knows nothing of sequences; never takes more than its budget.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from lookonce.core.errors import invalid
from lookonce.models.text_adapter import ModelShape, Stage


class KV:
    """`parts`: one [layers of the stage, 2, kv_heads, T, d] for each stage of the model, on the stage's device."""

    def __init__(self, parts: Sequence[torch.Tensor] = ()) -> None:
        self.parts = tuple(parts)

    @classmethod
    def empty(cls, shape: ModelShape, tokens: int) -> KV:
        """Room for so many tokens, not yet written."""
        return cls(
            [
                torch.empty(
                    (stage.layers, 2, shape.kv_heads, tokens, shape.head_dim), dtype=shape.dtype, device=stage.device
                )
                for stage in shape.stages
            ]
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts)

    def cut(self, start: int, end: int | None = None) -> KV:
        """A view of the tokens [start, end)."""
        return KV([part[..., start:end, :] for part in self.parts])

    def copy_(self, other: KV) -> None:
        """Take over the numbers of as many tokens."""
        for mine, theirs in zip(self.parts, other.parts, strict=True):
            mine.copy_(theirs)

    def clone(self) -> KV:
        """The same in memory of its own."""
        return KV([part.clone() for part in self.parts])

    def zero_(self) -> None:
        """Make all numbers zero."""
        for part in self.parts:
            part.zero_()

    def is_finite(self) -> bool:
        """Whether all numbers are finite."""
        return all(bool(part.isfinite().all()) for part in self.parts)

    @cached_property
    def layers(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values [kv_heads, T, d] of each layer, views. Compiled kernels do without: they want addresses."""
        return [(layer[0], layer[1]) for part in self.parts for layer in part.unbind(0)]


_LEAST_CAPACITY = 32
_LEAST_SLAB = 64


@dataclass(frozen=True)
class Slot:
    """Room for `capacity` tokens: slot `index` of a slab."""

    slab: int
    index: int
    capacity: int


class SuffixPool:
    """Slots of KV within `budget` bytes."""

    def __init__(self, shape: ModelShape, budget: int, slab_tokens: int) -> None:
        while slab_tokens > _LEAST_SLAB and slab_tokens * shape.token_bytes * 8 > budget:
            slab_tokens //= 2
        self.slabs = budget // (slab_tokens * shape.token_bytes)
        if self.slabs < 1:
            least = _LEAST_SLAB * shape.token_bytes
            raise invalid(f"kv_bytes is {budget}; this model needs at least {least}", param="kv_bytes")
        self.slab_tokens = slab_tokens
        self._shape = shape
        rows = slab_tokens * shape.kv_heads
        # zeros, not empty: a masked key weighs nothing, but nothing times NaN is NaN
        try:
            self.buffers = [_zeros(shape, stage, self.slabs * rows) for stage in shape.stages]
        except (MemoryError, RuntimeError) as error:  # numpy's, torch's
            text = f"kv_bytes is {budget}, more than there is memory for; give --kv-bytes less"
            raise invalid(text, param="kv_bytes") from error
        """What `flat` views, [layers, 2, all, d] for each stage of the model."""
        # per layer: keys and values [rows, d]
        self._flat = [(layer[0], layer[1]) for buffer in self.buffers for layer in buffer]
        self._rows = rows
        self._unused = list(range(self.slabs))  # heap of slabs without a class
        self._free: dict[int, list[int]] = {}  # slab in use -> heap of its free slots
        self._open: dict[int, set[int]] = {}  # capacity -> slabs with a free slot
        self._used: dict[int, int] = {}  # slab -> slots taken
        self._views: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    @property
    def bytes(self) -> int:
        """Size of the buffers."""
        return sum(buffer.nbytes for buffer in self.buffers)

    @property
    def used_slots(self) -> int:
        """Slots taken now."""
        return sum(self._used.values())

    def capacity_for(self, tokens: int) -> int:
        """The class that holds so many tokens."""
        capacity = _LEAST_CAPACITY
        while capacity < tokens:
            capacity *= 2
        return capacity

    def allocate(self, tokens: int) -> Slot | None:
        """A slot for so many tokens, or None when there is no room."""
        capacity = self.capacity_for(tokens)
        if capacity > self.slab_tokens:
            return None
        opened = self._open.setdefault(capacity, set())
        if not opened:
            if not self._unused:
                return None
            slab = heapq.heappop(self._unused)
            self._free[slab] = list(range(self.slab_tokens // capacity))
            self._used[slab] = 0
            opened.add(slab)
        slab = min(opened)
        index = heapq.heappop(self._free[slab])
        self._used[slab] += 1
        if not self._free[slab]:
            opened.remove(slab)
        return Slot(slab, index, capacity)

    def free(self, slot: Slot) -> None:
        """Give a slot back."""
        heapq.heappush(self._free[slot.slab], slot.index)
        self._open[slot.capacity].add(slot.slab)
        self._used[slot.slab] -= 1
        if not self._used[slot.slab]:
            self._open[slot.capacity].remove(slot.slab)
            del self._free[slot.slab], self._used[slot.slab]
            heapq.heappush(self._unused, slot.slab)

    def grow(self, slot: Slot, length: int, tokens: int) -> Slot | None:
        """A larger slot with the first `length` tokens copied over, the old one freed; None (nothing done) if full."""
        larger = self.allocate(tokens)
        if larger is None:
            return None
        self.kv(larger).cut(0, length).copy_(self.kv(slot).cut(0, length))
        self.free(slot)
        return larger

    def kv(self, slot: Slot) -> KV:
        """View of a slot: of `capacity` tokens."""
        heads, start = self._shape.kv_heads, self.row_of(slot)
        parts = (buffer[:, :, start : start + heads * slot.capacity] for buffer in self.buffers)
        return KV([part.view(-1, 2, heads, slot.capacity, self._shape.head_dim) for part in parts])

    def flat(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer as rows [all, d]; `row_of` says where a token's heads lie."""
        return self._flat[layer]

    def row_of(self, slot: Slot) -> int:
        """Row of a slot's first token of its first head; heads follow `capacity` rows apart, tokens one row apart."""
        return slot.slab * self._rows + slot.index * self._shape.kv_heads * slot.capacity

    def place_of(self, slot: Slot) -> int:
        """A slot's place among all of its capacity, were the whole buffer cut into those; see `class_view`."""
        return slot.slab * (self.slab_tokens // slot.capacity) + slot.index

    def class_view(self, layer: int, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer, two [places, kv_heads, capacity, d]: what lies in slabs of other capacities
        is seen cut wrongly, and finite."""
        views = self._views.get(capacity)
        if views is None:
            size = (-1, self._shape.kv_heads, capacity, self._shape.head_dim)
            views = self._views[capacity] = [(keys.view(size), values.view(size)) for keys, values in self._flat]
        return views[layer]


def _zeros(shape: ModelShape, stage: Stage, rows: int) -> torch.Tensor:
    """A zeroed buffer [layers of the stage, 2, rows, d]; on the CPU its pages are taken as slots are first used
    (torch.zeros would take them all)."""
    size = (stage.layers, 2, rows, shape.head_dim)
    if stage.device.type != "cpu":
        return torch.zeros(size, dtype=shape.dtype, device=stage.device)
    raw = np.zeros(math.prod(size) * shape.dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(shape.dtype).view(size)
