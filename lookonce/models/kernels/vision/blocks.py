"""A tower's blocks as one program of compiled kernels, or with kernels between products that are not ours (int8)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from lookonce.models.kernels.compiling import compiled_or_none
from lookonce.models.kernels.panels import PanelLinear
from lookonce.models.kernels.program import Kernel, run_kernels
from lookonce.models.kernels.vision.tower_kernels import Counted, Kernels, Packed, Shape
from lookonce.models.linear import Linear, VisionBlockWeights
from lookonce.models.omp_thread import Pause

_MLP_FLOATS = 1 << 22  # between the two layers of an MLP at once: they stay in the cache, and memory is used again

_AT_ONCE = 3e10  # operations of one run of kernels: a few tenths of a second on two cores


class VisionBlocks:
    """Called from one thread at a time."""

    def __init__(self, blocks: Sequence[VisionBlockWeights], norm: nn.LayerNorm, shape: Shape) -> None:
        """`norm` is the one behind the last block."""
        self._blocks, self.kernels = list(blocks), Kernels(shape)
        self._following = [block.norm1 for block in blocks[1:]] + [norm]
        self._inner, self._rows = shape.inner, max(1, _MLP_FLOATS // shape.inner)
        self._compiled = all(isinstance(matrix, PanelLinear) for block in blocks for matrix in block.matrices)

    def __call__(
        self, hidden: torch.Tensor, counts: Sequence[int], cos: torch.Tensor, sin: torch.Tensor, pause: Pause
    ) -> torch.Tensor:
        """Embedded patches [patches, width] of images with so many each -> normed [patches, width]; `hidden` is
        overwritten. Cosines and sines are [patches, 1, d / 2]. `pause` is called between two runs of kernels."""
        compute = self._by_program if self._compiled else self._between_products
        return compute(hidden, self.kernels.pack(counts, cos, sin), pause)

    def _by_program(self, hidden: torch.Tensor, packed: Packed, pause: Pause) -> torch.Tensor:
        """In few runs of kernels, without Python's lock."""
        kernels, (patches, width) = self.kernels, hidden.shape
        normed, mixed = torch.empty_like(hidden), torch.empty_like(hidden)
        qkv, inner = hidden.new_empty((patches, 3 * width)), hidden.new_empty((min(patches, self._rows), self._inner))
        one = 2.0 * patches * width * width  # operations of a product of all patches, square
        work: list[Counted] = [(kernels.norm_kernel(hidden, self._blocks[0].norm1, normed), 0.0)]
        for block, following in zip(self._blocks, self._following, strict=True):
            work += [
                (_panels(block.qkv).kernel("product", normed, qkv), 3 * one),
                *kernels.attend_kernels(qkv, packed, mixed, at_once=_AT_ONCE),
                (_panels(block.proj).kernel("product_plus", mixed, hidden, hidden), one),
                (kernels.norm_kernel(hidden, block.norm2, normed), 0.0),
            ]
            for rows, some in zip(*(torch.split(x, self._rows) for x in (normed, hidden)), strict=True):
                half = 2.0 * len(rows) * width * self._inner
                between = inner[: len(rows)]
                work += [
                    (_panels(block.fc1).kernel("product_gelu", rows, between), half),
                    (_panels(block.fc2).kernel("product_plus", between, some, some), half),
                ]
            work.append((kernels.norm_kernel(hidden, following, normed), 0.0))
        for chosen in _at_once(work):
            run_kernels(chosen, single_threaded=False)
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


def _at_once(work: Sequence[Counted]) -> Iterator[list[Kernel]]:
    """Kernels in runs, each ended by the first with which it has _AT_ONCE operations."""
    run: list[Kernel] = []
    operations = 0.0
    for kernel, count in work:
        run.append(kernel)
        operations += count
        if operations >= _AT_ONCE:
            yield run
            run, operations = [], 0.0
    if run:
        yield run


def _panels(matrix: Linear) -> PanelLinear:
    if not isinstance(matrix, PanelLinear):
        raise TypeError("not laid out in panels")
    return matrix


def blocks_for(blocks: Sequence[VisionBlockWeights], norm: nn.LayerNorm, heads: int) -> VisionBlocks | None:
    """The blocks by kernels, where they serve them: float32 on the CPU."""
    first = blocks[0]
    shape = Shape(first.norm1.normalized_shape[0] // heads, heads, first.inner, first.norm1.eps)
    return compiled_or_none(lambda: VisionBlocks(blocks, norm, shape)) if shape.supported else None
