"""Attention of a step's tokens by the compiled kernels."""

from __future__ import annotations

import numpy as np
import torch

from lm_service.engine.packed.execution.kernel_plan import NativePlan, Split, node_table, tensor_fields
from lm_service.engine.packed.execution.kernel_prefills import NativePrefills
from lm_service.engine.packed.prefix_cache.pool import SuffixPool
from lookonce.models.kernels.attention.kernels import Kernels, compiled, supported
from lookonce.models.kernels.attention.table import Field
from lookonce.models.kernels.compiling import compiled_or_none
from lookonce.models.kernels.omp_team import barrier
from lookonce.models.kernels.program import Ints, row_addresses, run_program
from lookonce.models.text_adapter import ModelShape

_BYTES = 4  # of a float32


def kernels_for(shape: ModelShape) -> Kernels | None:
    """The kernels for a model's heads, where they serve it: float32 on the CPU."""
    if shape.dtype != torch.float32 or shape.device.type != "cpu" or len(shape.stages) > 1:
        return None
    if not supported(shape.head_dim, shape.group):
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


class NativeSuffixes:
    """Stores a step's new keys and values and attends from its tail tokens, layer by layer."""

    def __init__(
        self, kernels: Kernels, shape: ModelShape, pool: SuffixPool, plan: NativePlan, workspace: Workspace
    ) -> None:
        self._kernel = kernels.attend
        partial, suffixes = workspace.partial(max(wave.partial for wave in plan.waves)), plan.suffixes
        table = np.zeros((shape.layers, len(Field)), dtype=np.int64)
        self._held = (plan, partial)  # what the tables point to
        table[:, Field.POOL_KEYS : Field.OUT] = pool.addresses
        table[:, Field.POOL_ROWS] = suffixes.rows.ctypes.data
        table[:, Field.VISIBLE] = suffixes.visible.ctypes.data
        table[:, Field.MASK_ROWS] = suffixes.mask_rows.ctypes.data
        table[:, Field.MASKS], table[:, Field.MASK_WIDTH] = suffixes.masks.ctypes.data, suffixes.masks.shape[1]
        table[:, Field.SEEN], table[:, Field.SEEN_PARTS] = plan.seen.ctypes.data, plan.seen_parts.ctypes.data
        table[:, Field.PARTIAL] = partial.data_ptr()
        table[:, Field.BARRIER] = barrier()
        self._splits = [_SplitTables(table.copy(), wave, shape) for wave in plan.waves]
        self._splits[0].table[:, Field.STORED] = len(suffixes.visible)

    def calls(self, tensors: list[int], out: int) -> Ints:
        """What to call, int64 [layers, waves, 2], when in every layer queries, keys and values are where `tensors`
        says (see `tensor_fields`) and the output goes to `out`. Each call is for once."""
        calls = np.empty((len(self._splits[0].table), len(self._splits), 2), dtype=np.int64)
        calls[:, :, 0] = self._kernel
        for number, wave in enumerate(self._splits):
            wave.table[:, Field.LOOK_COUNTER : Field.LOOKS] = 0
            wave.table[:, Field.QUERY : Field.POOL_KEYS], wave.table[:, Field.OUT] = tensors, out
            calls[:, number, 1] = row_addresses(wave.table)
        return calls


class _SplitTables:
    """A table for each layer."""

    def __init__(self, table: Ints, wave: Split, shape: ModelShape) -> None:
        self._nodes = node_table([stretch.node for stretch in wave.stretches], shape)
        table[:, Field.NODES] = row_addresses(self._nodes)
        table[:, Field.LOOKS], table[:, Field.ITEMS] = len(wave.items), wave.items.ctypes.data
        table[:, Field.PARTS] = wave.parts.ctypes.data
        table[:, Field.BEGIN], table[:, Field.END] = wave.begin, wave.end
        self.table = table


class NativeAttention:
    """An `Attend` of which kernels do all."""

    def __init__(
        self, shape: ModelShape, prefill_tokens: int, prefills: NativePrefills | None, suffixes: NativeSuffixes | None
    ):
        """The first `prefill_tokens` tokens of the step belong to `prefills`, the others to `suffixes`."""
        self._shape, self._count, self._prefills, self._suffixes = shape, prefill_tokens, prefills, suffixes

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See `Attend`."""
        out = q.new_empty((q.shape[0], q.shape[1] * q.shape[2]))
        run_program(self.calls(tensor_fields(q, k, v), out.data_ptr())[layer], alone=False)
        return out

    def calls(self, tensors: list[int], out: int) -> Ints:
        """See `NativeTails.calls`; int64 [layers, n, 2]."""
        found = [] if self._prefills is None else [self._prefills.calls(tensors, out)]
        if self._suffixes is not None:
            (q, q_step, k, k_step, v, v_step), first = tensors, self._count * _BYTES
            behind = [q + first * q_step, q_step, k + first * k_step, k_step, v + first * v_step, v_step]
            found.append(self._suffixes.calls(behind, out + first * self._shape.heads * self._shape.head_dim))
        return np.concatenate(found, axis=1)
