"""The compiled kernels of a tower, as functions of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir
from torch import nn

from lookonce.models.kernels.compiling import VECTORS, Compiled, lanes_for
from lookonce.models.kernels.omp_team import barrier
from lookonce.models.kernels.program import Call, run_calls
from lookonce.models.kernels.vision import attention
from lookonce.models.kernels.vision.attention import Block, Heads, write_attention
from lookonce.models.kernels.vision.rows import write_gelu, write_lookup, write_norm

Counted = tuple[Call, float]
"""A call, and about how many operations it is."""
_EXPONENTIAL = 128  # operations that one costs as much as
_ALONE = 1 << 14  # float32 up to which other threads don't pay


@dataclass(frozen=True)
class Shape:
    """A tower's: `heads` heads of `size` in rows of `width`, `inner` places between the two layers of an MLP."""

    size: int
    heads: int
    inner: int
    epsilon: float

    @property
    def width(self) -> int:
        """Of a patch's row."""
        return self.size * self.heads

    @property
    def supported(self) -> bool:
        """Whether there are kernels for it."""
        return self.size % 8 == 0 and 8 <= self.size <= 256 and self.inner % 4 == 0


@dataclass(frozen=True)
class Packed:
    """The pictures of a batch, end to end: who attends to whom, and by which angles it is rotated."""

    blocks: npt.NDArray[np.int64]  # [blocks, len(Block)]
    cos: torch.Tensor  # [patches, d / 2]
    sin: torch.Tensor
    laid: torch.Tensor  # [3 * heads * patches * d], where queries, keys and values are laid


class Kernels:
    """For float32 on the CPU; called from one thread at a time."""

    def __init__(self, shape: Shape) -> None:
        self._shape, self._heads = shape, _heads(shape)
        self._code = _compiled(shape)

    def pack(self, counts: Sequence[int], cos: torch.Tensor, sin: torch.Tensor) -> Packed:
        """Pictures of so many patches each, end to end. The largest come first: they are work for longest."""
        ends = np.cumsum(counts).tolist()
        pictures = sorted(zip(counts, ends, strict=True), reverse=True)
        height = self._heads.block
        blocks = [
            (end - count, end, row, min(height, end - row))
            for count, end in pictures
            for row in range(end - count, end, height)
        ]
        laid = torch.empty(3 * self._heads.count * self._heads.size * sum(counts))
        return Packed(np.array(blocks, dtype=np.int64), cos.contiguous(), sin.contiguous(), laid)

    def attend(self, qkv: torch.Tensor, packed: Packed) -> torch.Tensor:
        """[patches, 3 * width] -> [patches, width]: each picture's patches attend to each other."""
        qkv = qkv.contiguous()
        out = qkv.new_empty((qkv.shape[0], self._shape.width))
        run_calls([call for call, _ in self.attend_calls(qkv, packed, out)], alone=False)
        return out

    def attend_calls(
        self, qkv: torch.Tensor, packed: Packed, out: torch.Tensor, *, at_once: float = math.inf
    ) -> list[Counted]:
        """What computes `attend`: several calls when it is more than `at_once` operations."""
        patches, heads, field = qkv.shape[0], self._heads, attention.Field
        reach = packed.blocks[:, Block.END] - packed.blocks[:, Block.BEGIN]
        operations = heads.count * (4.0 * heads.size + _EXPONENTIAL) * packed.blocks[:, Block.ROWS] * reach
        calls: list[Counted] = []
        for some in np.split(np.arange(len(reach)), _prefix_policy(operations, at_once)):
            table, blocks = np.zeros(len(field), dtype=np.int64), packed.blocks[some[0] : some[-1] + 1]
            table[field.PATCHES :] = (
                *(patches, qkv.data_ptr(), packed.cos.data_ptr(), packed.sin.data_ptr(), packed.laid.data_ptr()),
                *(patches * heads.size, out.data_ptr(), blocks.ctypes.data, len(blocks), barrier()),
            )
            call = self._code.address("attend_laid" if calls else "attend"), table
            calls.append((call, float(operations[some].sum())))
        return calls

    def lookup(self, pixels: npt.NDArray[np.uint8], table: torch.Tensor) -> torch.Tensor:
        """Values of pixels [patches, 3, places] by a table [3 * 256] -> [patches, 3 * places]."""
        patches, channels, places = pixels.shape
        out = table.new_empty((patches, channels * places))
        fields = (0, patches, pixels.ctypes.data, table.data_ptr(), out.data_ptr(), places)
        run_calls([(self._code.address("lookup"), fields)], alone=out.numel() <= _ALONE)
        return out

    def norm(self, x: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
        """Layer norm of x [patches, width]."""
        out = torch.empty_like(x)
        run_calls([self.norm_call(x, norm, out)], alone=x.numel() <= _ALONE)
        return out

    def norm_call(self, x: torch.Tensor, norm: nn.LayerNorm, out: torch.Tensor) -> Call:
        """What computes `norm`."""
        weights = norm.weight.data_ptr(), norm.bias.data_ptr()
        return self._code.address("norm"), (0, x.shape[0], x.data_ptr(), 0, out.data_ptr(), *weights)

    def add_norm(self, x: torch.Tensor, added: torch.Tensor, norm: nn.LayerNorm, out: torch.Tensor) -> None:
        """x += added, and `out` becomes the layer norm of that; all [patches, width]."""
        added = added.contiguous()
        weights = norm.weight.data_ptr(), norm.bias.data_ptr()
        fields = (0, x.shape[0], x.data_ptr(), added.data_ptr(), out.data_ptr(), *weights)
        run_calls([(self._code.address("add_norm"), fields)], alone=x.numel() <= _ALONE)

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        """x [patches, inner] * sigmoid(1.702 x), in place of x."""
        x = x.contiguous()
        run_calls([(self._code.address("gelu"), (0, x.shape[0], x.data_ptr()))], alone=x.numel() <= _ALONE)
        return x


def _prefix_policy(operations: npt.NDArray[np.float64], at_once: float) -> list[int]:
    """Where to cut work of so many operations each, such that each piece has about `at_once`, and at least one item."""
    pieces = np.floor((np.cumsum(operations) - operations) / at_once)
    return (np.flatnonzero(np.diff(pieces)) + 1).tolist()


def _heads(shape: Shape) -> Heads:
    return Heads(shape.size, shape.heads, lanes_for(shape.size), VECTORS)


@lru_cache
def _compiled(shape: Shape) -> Compiled:
    def write(module: ir.Module) -> None:
        write_attention(module, _heads(shape))
        write_norm(module, "norm", shape.width, shape.epsilon, adding=False)
        write_norm(module, "add_norm", shape.width, shape.epsilon, adding=True)
        write_gelu(module, shape.inner)
        write_lookup(module)

    return Compiled(write)
