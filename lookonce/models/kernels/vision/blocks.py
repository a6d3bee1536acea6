"""A tower's blocks as one program of compiled kernels, or with kernels between products that are not ours (int8)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from lookonce.models.kernels.compiling import compiled_or_none
from lookonce.models.kernels.panels import PanelLinear, product_address
from lookonce.models.kernels.products import Product
from lookonce.models.kernels.program import run_program
from lookonce.models.kernels.structs import calls_of, joined, stacked
from lookonce.models.kernels.vision.tower_kernels import Counted, Kernels, Packed, Shape
from lookonce.models.linear import Linear, VisionBlockWeights
from lookonce.models.omp_thread import Pause

_MLP_FLOATS = 1 << 22  # between the two layers of an MLP at once: they stay in the cache, and memory is used again

_AT_ONCE = 3e10  # operations of one run of kernels: a few tenths of a second on two cores


class _Products:
    """A product that each block has, by matrices of one size."""

    def __init__(self, name: str, matrices: Sequence[Linear]) -> None:
        self._held = [_panels(matrix) for matrix in matrices]
        self._function = product_address(name)
        self._structs = stacked(Product, [panels.struct for panels in self._held])
        self._sizes = {name: int(self._structs[name].max()) for name in ("depth", "columns")}

    def __call__(self, x: torch.Tensor, out: torch.Tensor, other: torch.Tensor | None = None) -> Counted:
        """Of rows x [T, in], to `out` [T, out]."""
        values = {"source": x, "out": out} if other is None else {"source": x, "out": out, "other": other}
        structs = Product.fill(joined([self._structs]), self._sizes, rows=x.shape[0], **values)
        return self._function, structs, 2.0 * len(x) * self._sizes["depth"] * self._sizes["columns"]


class VisionBlocks:
    """Called from one thread at a time."""

    def __init__(self, blocks: Sequence[VisionBlockWeights], norm: nn.LayerNorm, shape: Shape) -> None:
        """`norm` is the one behind the last block."""
        self._blocks, self.kernels = list(blocks), Kernels(shape)
        self._following = [block.norm1 for block in blocks[1:]] + [norm]
        self._inner, self._rows = shape.inner, max(1, _MLP_FLOATS // shape.inner)
        self._compiled = all(isinstance(matrix, PanelLinear) for block in blocks for matrix in block.matrices)
        if self._compiled:
            self._qkv = _Products("product", [block.qkv for block in blocks])
            self._proj = _Products("product_plus", [block.proj for block in blocks])
            self._fc1 = _Products("product_gelu", [block.fc1 for block in blocks])
            self._fc2 = _Products("product_plus", [block.fc2 for block in blocks])
            norms = [blocks[0].norm1], [block.norm2 for block in blocks], self._following
            self._norm1, self._norm2, self._behind = map(self.kernels.norms, norms)

    def __call__(
        self, hidden: torch.Tensor, counts: Sequence[int], cos: torch.Tensor, sin: torch.Tensor, pause: Pause
    ) -> torch.Tensor:
        """Embedded patches [patches, width] of images with so many each -> normed [patches, width]; `hidden` is
        overwritten. Cosines and sines are [patches, 1, d / 2]. `pause` is called between two runs of kernels."""
        compute = self._by_program if self._compiled else self._between_products
        return compute(hidden, self.kernels.pack(counts, cos, sin), pause)

    def _by_program(self, hidden: torch.Tensor, packed: Packed, pause: Pause) -> torch.Tensor:
        """In few runs of kernels, without Python's lock. All blocks have the same buffers: what each kernel is told is
        checked once for all of them."""
        kernels, (patches, width), blocks = self.kernels, hidden.shape, len(self._blocks)
        normed, mixed = torch.empty_like(hidden), torch.empty_like(hidden)
        qkv, inner = hidden.new_empty((patches, 3 * width)), hidden.new_empty((min(patches, self._rows), self._inner))
        work = [
            self._qkv(normed, qkv),
            *kernels.attend_kernels(qkv, packed, mixed, at_once=_AT_ONCE, blocks=blocks),
            self._proj(mixed, hidden, hidden),
            kernels.norm_kernels(hidden, self._norm2, normed),
        ]
        for rows, some in zip(*(torch.split(x, self._rows) for x in (normed, hidden)), strict=True):
            between = inner[: len(rows)]
            work += [self._fc1(rows, between), self._fc2(between, some, some)]
        work.append(kernels.norm_kernels(hidden, self._behind, normed))
        before = kernels.norm_kernels(hidden, self._norm1, normed)
        calls = joined([calls_of([before[:2]])[0], calls_of([(one[0], one[1]) for one in work]).reshape(-1)])
        for run in _at_once([0.0] + [one[2] for one in work] * blocks):
            run_program(calls[run], single_threaded=False)
            pause()
        return normed

    def _between_products(self, hidden: torch.Tensor, packed: Packed, pause: Pause) -> torch.Tensor:
        """The same for products that are not ours."""
        kernels = self.kernels
        normed = kernels.norm(hidden, self._blocks[0].norm1)
        for block, following in zip(self._blocks, self._following, strict=True):
            mixed = kernels.attend(block.qkv(normed), packed)
            kernels.add_norm(hidden, block.proj(mixed), block.norm2, normed)
            for some, rows in zip(*(torch.split(x, self._rows) for x in (hidden, normed)), strict=True):
                inner = kernels.gelu(block.fc1(rows))
                kernels.add_norm(some, block.fc2(inner), following, rows)
                pause()
        return normed


def _at_once(operations: Sequence[float]) -> Iterator[slice]:
    """Calls of so many operations each in runs, each ended by the first with which it has _AT_ONCE operations."""
    begin, total = 0, 0.0
    for number, count in enumerate(operations):
        total += count
        if total >= _AT_ONCE:
            yield slice(begin, number + 1)
            begin, total = number + 1, 0.0
    if begin < len(operations):
        yield slice(begin, len(operations))


def _panels(matrix: Linear) -> PanelLinear:
    if not isinstance(matrix, PanelLinear):
        raise TypeError("not laid out in panels")
    return matrix


def blocks_for(blocks: Sequence[VisionBlockWeights], norm: nn.LayerNorm, heads: int) -> VisionBlocks | None:
    """The blocks by kernels, where they serve them: float32 on the CPU."""
    first = blocks[0]
    shape = Shape(first.norm1.normalized_shape[0] // heads, heads, first.inner, first.norm1.eps)
    return compiled_or_none(lambda: VisionBlocks(blocks, norm, shape)) if shape.supported else None
