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
from lookonce.models.kernels.program import Kernel, barrier, run_kernels, run_program
from lookonce.models.kernels.structs import Structs, calls_of, joined, stacked
from lookonce.models.kernels.vision.rows import Gelu, LayerNorm, Lookup, write_gelu, write_lookup, write_norm
from lookonce.models.kernels.vision.tower_attention import Attention, Block, Heads, write_attention
from lookonce.models.omp_thread import Pause

Counted = tuple[int, Structs, float]
"""A kernel's function, its structs [blocks], and about how many operations each is."""
_EXPONENTIAL = 128  # operations that one costs as much as
_SINGLE_THREADED = 1 << 14  # float32 up to which other threads don't pay


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
    """The images of a batch, end to end: who attends to whom, and by which angles it is rotated."""

    patches: int
    blocks: Structs  # Block [n]
    cos: torch.Tensor  # [patches, d / 2]
    sin: torch.Tensor
    heads: torch.Tensor  # [3 * heads * patches * d], where queries, keys and values are packed


class Kernels:
    """For float32 on the CPU; called from one thread at a time."""

    def __init__(self, shape: Shape) -> None:
        self._shape, self._heads = shape, _heads(shape)
        self._code = _compiled(shape)
        self._sizes = {"width": shape.width, "inner": shape.inner, "size": shape.size, "heads": shape.heads}
        self._sizes["half"] = shape.size // 2

    def pack(self, counts: Sequence[int], cos: torch.Tensor, sin: torch.Tensor) -> Packed:
        """Images of so many patches each, end to end. The largest come first: they are work for longest."""
        ends = np.cumsum(counts).tolist()
        images = sorted(zip(counts, ends, strict=True), reverse=True)
        height = self._heads.block
        blocks = [
            (end - count, end, row, min(height, end - row))
            for count, end in images
            for row in range(end - count, end, height)
        ]
        patches = sum(counts)
        heads = torch.empty(3 * self._heads.count * self._heads.size * patches)
        return Packed(patches, np.array(blocks, dtype=Block.dtype), cos.contiguous(), sin.contiguous(), heads)

    def attend(
        self, qkv: torch.Tensor, packed: Packed, pause: Pause = lambda: None, *, at_once: float = math.inf
    ) -> torch.Tensor:
        """[patches, 3 * width] -> [patches, width]: each image's patches attend to each other. `pause` is called after
        every `at_once` operations or so."""
        qkv = qkv.contiguous()
        out = qkv.new_empty((qkv.shape[0], self._shape.width))
        for function, structs, _ in self.attend_kernels(qkv, packed, out, at_once=at_once):
            run_program(calls_of([(function, structs)])[0], single_threaded=False)
            pause()
        return out

    def attend_kernels(
        self, qkv: torch.Tensor, packed: Packed, out: torch.Tensor, *, at_once: float = math.inf, blocks: int = 1
    ) -> list[Counted]:
        """What computes `attend` in so many blocks: several kernels when it is more than `at_once` operations."""
        patches, heads = packed.patches, self._heads
        reach = packed.blocks["end"] - packed.blocks["begin"]
        operations = heads.count * (4.0 * heads.size + _EXPONENTIAL) * packed.blocks["rows"] * reach
        kernels: list[Counted] = []
        for some in np.split(np.arange(len(reach)), _cuts(operations, at_once)):
            rows = packed.blocks[some[0] : some[-1] + 1]
            structs = Attention.fill(
                Attention.zeros(blocks),
                self._sizes,
                patches=patches,
                qkv=qkv,
                cos=packed.cos,
                sin=packed.sin,
                packed=packed.heads,
                plane=patches * heads.size,
                out=out,
                blocks=rows,
                count=len(rows),
                barrier=barrier(),
            )
            function = self._code.address("attend_more" if kernels else "attend")
            kernels.append((function, structs, float(operations[some].sum())))
        return kernels

    def lookup(self, pixels: npt.NDArray[np.uint8], table: torch.Tensor) -> torch.Tensor:
        """Values of pixels [patches, 3, places] by a table [3 * 256] -> [patches, 3 * places]."""
        patches, channels, places = pixels.shape
        out = table.new_empty((patches, channels * places))
        struct = Lookup.fill(Lookup.one(), rows=patches, places=places, pixels=pixels, table=table, out=out)
        run_kernels([(self._code.address("lookup"), struct)], single_threaded=out.numel() <= _SINGLE_THREADED)
        return out

    def norm(self, x: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
        """Layer norm of x [patches, width]."""
        out = torch.empty_like(x)
        run_kernels([self.norm_kernel(x, norm, out)], single_threaded=x.numel() <= _SINGLE_THREADED)
        return out

    def norm_kernel(
        self, x: torch.Tensor, norm: nn.LayerNorm, out: torch.Tensor, added: torch.Tensor | None = None
    ) -> Kernel:
        """What computes `norm`, or `add_norm`."""
        values = {"source": x, "weight": norm.weight, "shift": norm.bias, "out": out}
        if added is not None:
            values["added"] = added
        struct = LayerNorm.fill(LayerNorm.one(), self._sizes, rows=x.shape[0], **values)
        return self._code.address("norm" if added is None else "add_norm"), struct

    def norms(self, norms: Sequence[nn.LayerNorm]) -> Structs:
        """LayerNorm [norms], told of their weights."""
        told = [LayerNorm.fill(LayerNorm.one(), self._sizes, weight=one.weight, shift=one.bias) for one in norms]
        return stacked(LayerNorm, told)

    def norm_kernels(self, x: torch.Tensor, norms: Structs, out: torch.Tensor) -> Counted:
        """What computes `norm` by each of `norms`."""
        structs = LayerNorm.fill(joined([norms]), self._sizes, rows=x.shape[0], source=x, out=out)
        return self._code.address("norm"), structs, 0.0

    def add_norm(self, x: torch.Tensor, added: torch.Tensor, norm: nn.LayerNorm, out: torch.Tensor) -> None:
        """x += added, and `out` becomes the layer norm of that; all [patches, width]."""
        kernel = self.norm_kernel(x, norm, out, added.contiguous())
        run_kernels([kernel], single_threaded=x.numel() <= _SINGLE_THREADED)

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        """x [patches, inner] * sigmoid(1.702 x), in place of x."""
        x = x.contiguous()
        struct = Gelu.fill(Gelu.one(), self._sizes, rows=x.shape[0], values=x)
        run_kernels([(self._code.address("gelu"), struct)], single_threaded=x.numel() <= _SINGLE_THREADED)
        return x


def _cuts(operations: npt.NDArray[np.float64], at_once: float) -> list[int]:
    """Where to cut work of so many operations each, such that each cut has about `at_once`, and at least one item."""
    numbers = np.floor((np.cumsum(operations) - operations) / at_once)
    return (np.flatnonzero(np.diff(numbers)) + 1).tolist()


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
