"""Attention of a step's tail tokens by the compiled kernels."""

from __future__ import annotations

import numpy as np
import torch

from lm_service.engine.packed.adapter import ModelShape
from lm_service.engine.packed.native.kernels import Kernels, compiled, supported
from lm_service.engine.packed.native.plan import Ints, NativePlan, Wave, node_table, tensor_fields
from lm_service.engine.packed.native.table import Field
from lm_service.engine.packed.pool import TailPool
from lookonce.native.compiling import compiled_or_none
from lookonce.native.team import barrier, run


def kernels_for(shape: ModelShape) -> Kernels | None:
    """The kernels for a model's heads, where they serve it: float32 on the CPU."""
    if shape.dtype != torch.float32 or shape.device.type != "cpu" or len(shape.stages) > 1:
        return None
    if not supported(shape.head_dim):
        return None
    return compiled_or_none(lambda: compiled(shape.head_dim, shape.group, shape.kv_heads))


class Workspace:
    """Memory for partial results, kept from step to step and grown when a step needs more."""

    def __init__(self) -> None:
        self._partial = torch.empty(0)

    def partial(self, count: int) -> torch.Tensor:
        """Room for so many float32, not written yet."""
        if self._partial.numel() < count:
            self._partial = torch.empty(count)
        return self._partial


class NativeTails:
    """Stores a step's new keys and values and attends from its tail tokens, layer by layer."""

    def __init__(
        self, kernels: Kernels, shape: ModelShape, pool: TailPool, plan: NativePlan, workspace: Workspace
    ) -> None:
        self._kernels, self._pool = kernels, pool
        partial, tails = workspace.partial(max(wave.partial for wave in plan.waves)), plan.tails
        table = np.zeros(len(Field), dtype=np.int64)
        self._held = (plan, partial)  # what the table points to
        table[Field.POOL_ROWS] = tails.rows.ctypes.data
        table[Field.VISIBLE] = tails.visible.ctypes.data
        table[Field.MASK_ROWS] = tails.mask_rows.ctypes.data
        table[Field.MASKS], table[Field.MASK_WIDTH] = tails.masks.ctypes.data, tails.masks.shape[1]
        table[Field.SEEN], table[Field.SEEN_PARTS] = plan.seen.ctypes.data, plan.seen_parts.ctypes.data
        table[Field.PARTIAL] = partial.data_ptr()
        table[Field.BARRIER] = barrier()
        self._waves = [_Wave(table.copy(), wave, shape) for wave in plan.waves]
        self._waves[0].table[Field.STORED] = len(tails.visible)

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [T, heads, d], k and v [T, kv_heads, d], each token's heads in one piece -> [T, heads * d]."""
        out = q.new_empty((q.shape[0], q.shape[1] * q.shape[2]))
        keys, values = self._pool.flat(layer)
        tensors = [*tensor_fields(q, k, v), keys.data_ptr(), values.data_ptr(), out.data_ptr()]
        for wave in self._waves:
            wave.attend(self._kernels, layer, tensors)
        return out


class _Wave:
    """A table for each wave."""

    def __init__(self, table: Ints, wave: Wave, shape: ModelShape) -> None:
        self._nodes = node_table([stretch.node for stretch in wave.stretches], shape)
        self._layer_bytes, self._first = self._nodes.strides[0], self._nodes.ctypes.data
        table[Field.LOOKS], table[Field.ITEMS] = len(wave.items), wave.items.ctypes.data
        table[Field.PARTS] = wave.parts.ctypes.data
        table[Field.BEGIN], table[Field.END] = wave.begin, wave.end
        self.table, self._address = table, table.ctypes.data

    def attend(self, kernels: Kernels, layer: int, tensors: list[int]) -> None:
        """`tensors` are the fields from QUERY to OUT."""
        table = self.table
        table[Field.LOOK_COUNTER : Field.LOOKS] = 0
        table[Field.NODES] = self._first + layer * self._layer_bytes
        table[Field.QUERY : Field.ITEMS] = tensors
        run(kernels.attend, self._address)
