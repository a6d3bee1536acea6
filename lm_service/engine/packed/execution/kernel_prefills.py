"""Filling of prefixes by the compiled kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from lm_service.engine.packed.execution.attention import PrefillSpan
from lm_service.engine.packed.execution.kernel_plan import node_table
from lookonce.models.kernels.attention.kernels import Kernels
from lookonce.models.kernels.attention.prefill import Field, Item, tokens_of_block
from lookonce.models.kernels.omp_team import barrier
from lookonce.models.kernels.program import Ints, row_addresses
from lookonce.models.text_adapter import ModelShape


class NativePrefills:
    """Stores a step's new keys and values of prefixes and attends from its tokens, layer by layer."""

    def __init__(self, kernels: Kernels, shape: ModelShape, parts: Sequence[PrefillSpan]) -> None:
        """`parts` in the order of the step's tokens, from the first one on."""
        self._kernel = kernels.prefill
        stretches = [[*part.ancestors, part.node] for part in parts]
        nodes = [node for path in stretches for node in path]
        own = np.cumsum([len(path) for path in stretches]) - 1
        height = tokens_of_block(kernels.heads)
        items = [item for number, part in enumerate(parts) for item in _items(part, int(own[number]), height)]
        items.sort(key=lambda item: -item[Item.PLACE])  # those with the most to look at first
        self._items = _for_heads(items, shape.kv_heads)
        self._places = np.array(
            [
                (own[number], part.start + place)
                for number, part in enumerate(parts)
                for place in range(part.end - part.begin)
            ],
            dtype=np.int64,
        )
        self._lengths = np.array([node.length for node in nodes], dtype=np.int64)
        self._nodes = node_table(nodes, shape)
        self._table = table = np.zeros((shape.layers, len(Field)), dtype=np.int64)
        table[:, Field.TOKENS], table[:-1, Field.LOOKS] = len(self._places), len(self._items)
        table[:, Field.ITEMS], table[:, Field.LENGTHS] = self._items.ctypes.data, self._lengths.ctypes.data
        table[:, Field.PLACES], table[:, Field.BARRIER] = self._places.ctypes.data, barrier()
        table[:, Field.NODES] = row_addresses(self._nodes)

    def calls(self, tensors: list[int], out: int) -> Ints:
        """What to call, int64 [layers, 1, 2], when in every layer queries, keys and values are where `tensors` says
        (see `tensor_fields`) and the output goes to `out`, [T, heads * d]. That is not written in the last layer: there
        no row of a fill is read after its keys and values. Each call is for once."""
        table = self._table
        table[:, : Field.TOKENS] = 0
        table[:, Field.QUERY : Field.OUT], table[:, Field.OUT] = tensors, out
        calls = np.empty((len(table), 1, 2), dtype=np.int64)
        calls[:, 0, 0], calls[:, 0, 1] = self._kernel, row_addresses(table)
        return calls


def _items(part: PrefillSpan, own: int, height: int) -> Iterator[list[int]]:
    """Its blocks, for one head."""
    place, end = part.start, part.start + part.end - part.begin
    while place < end:
        border = min(end, place - place % height + height)
        token = part.begin + place - part.start
        yield [0, token, border - place, place, own - len(part.ancestors), own]
        place = border


def _for_heads(items: list[list[int]], kv_heads: int) -> Ints:
    """int64 [items * kv_heads, len(Item)]: all heads of a block one after the other."""
    table = np.repeat(np.array(items, dtype=np.int64), kv_heads, axis=0)
    table[:, Item.HEAD] = np.tile(np.arange(kv_heads), len(items))
    return table
