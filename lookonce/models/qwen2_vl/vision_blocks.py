"""The tower's blocks as one program of compiled kernels, or with kernels between products that are not ours (int8)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from lookonce.models.kernels.compiling import compiled_or_none
from lookonce.models.kernels.panels import PanelLinear, PanelModule
from lookonce.models.kernels.program import Call, run_calls
from lookonce.models.kernels.vision.kernels import Counted, Kernels, Packed, Shape
from lookonce.models.omp_thread import Pause
from lookonce.models.qwen2_vl.modules import VisionBlock, VisionTower

_MLP_FLOATS = 1 << 22  # between the two layers of an MLP at once: they stay in the cache, and memory is used again

_AT_ONCE = 3e10  # operations of one call of kernels: a few tenths of a second on two cores


class NativeBlocks:
    """Called from one thread at a time."""

    def __init__(self, tower: VisionTower, shape: Shape) -> None:
        self._tower, self.kernels = tower, Kernels(shape)
        self._inner, self._rows = shape.inner, max(1, _MLP_FLOATS // shape.inner)
        matrices = [matrix for block in tower.blocks for matrix in _matrices(block)]
        self._compiled = all(isinstance(matrix, PanelModule) for matrix in matrices)

    def __call__(
        self, hidden: torch.Tensor, counts: Sequence[int], cos: torch.Tensor, sin: torch.Tensor, pause: Pause
    ) -> torch.Tensor:
        """Embedded patches [patches, width] of pictures with so many each -> [tokens, hidden]; `hidden` is overwritten.
        Cosines and sines are [patches, 1, d / 2]. `pause` is called between two calls of kernels."""
        packed, merger = self.kernels.pack(counts, cos, sin), self._tower.merger
        compute = self._by_program if self._compiled else self._between_products
        tokens: torch.Tensor = merger.mlp(compute(hidden, packed, pause).view(-1, merger.inner))
        return tokens

    def _by_program(self, hidden: torch.Tensor, packed: Packed, pause: Pause) -> torch.Tensor:
        """What the merger's layers get, [patches, width]: in few calls of kernels, without Python's lock."""
        kernels, (patches, width), size = self.kernels, hidden.shape, hidden.element_size()
        normed, mixed = torch.empty_like(hidden), torch.empty_like(hidden)
        qkv, inner = hidden.new_empty((patches, 3 * width)), hidden.new_empty((min(patches, self._rows), self._inner))
        one = 2.0 * patches * width * width  # operations of a product of all patches, square
        calls: list[Counted] = [(kernels.norm_call(hidden, self._tower.blocks[0].norm1, normed), 0.0)]
        for block, following in self._blocks():
            calls += [
                (_linear(block.attn.qkv).call("product", normed.data_ptr(), patches, qkv.data_ptr()), 3 * one),
                *kernels.attend_calls(qkv, packed, mixed, at_once=_AT_ONCE),
                (_linear(block.attn.proj).call("product_plus", mixed.data_ptr(), patches, hidden.data_ptr()), one),
                (kernels.norm_call(hidden, block.norm2, normed), 0.0),
            ]
            for begin in range(0, patches, self._rows):
                rows, at = min(self._rows, patches - begin), begin * width * size
                half = 2.0 * rows * width * self._inner
                calls += [
                    (_linear(block.mlp.fc1).call("product_gelu", normed.data_ptr() + at, rows, inner.data_ptr()), half),
                    (_linear(block.mlp.fc2).call("product_plus", inner.data_ptr(), rows, hidden.data_ptr() + at), half),
                ]
            calls.append((kernels.norm_call(hidden, following, normed), 0.0))
        for some in _at_once(calls):
            run_calls(some, alone=False)
            pause()
        return normed

    def _between_products(self, hidden: torch.Tensor, packed: Packed, pause: Pause) -> torch.Tensor:
        """The same for products that are not ours."""
        kernels = self.kernels
        normed = kernels.norm(hidden, self._tower.blocks[0].norm1)
        for block, following in self._blocks():
            mixed = kernels.attend(block.attn.qkv(normed), packed)
            kernels.add_norm(hidden, block.attn.proj(mixed), block.norm2, normed)
            for some, part in zip(*(torch.split(x, self._rows) for x in (hidden, normed)), strict=True):
                inner = kernels.gelu(block.mlp.fc1(part))
                kernels.add_norm(some, block.mlp.fc2(inner), following, part)
                pause()
        return normed

    def _blocks(self) -> Iterator[tuple[VisionBlock, nn.LayerNorm]]:
        """With the norm that follows."""
        blocks = list(self._tower.blocks)
        return zip(blocks, [block.norm1 for block in blocks[1:]] + [self._tower.merger.ln_q], strict=True)


def _at_once(calls: Sequence[Counted]) -> Iterator[list[Call]]:
    """Calls in pieces, each ended by the first with which it has _AT_ONCE operations."""
    piece: list[Call] = []
    operations = 0.0
    for call, count in calls:
        piece.append(call)
        operations += count
        if operations >= _AT_ONCE:
            yield piece
            piece, operations = [], 0.0
    if piece:
        yield piece


def _linear(module: nn.Module) -> PanelLinear:
    if not isinstance(module, PanelModule):
        raise TypeError("not laid out in panels")
    return module.linear


def _matrices(block: VisionBlock) -> tuple[nn.Module, ...]:
    return block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2


def blocks_for(tower: VisionTower, dtype: torch.dtype, device: torch.device) -> NativeBlocks | None:
    """The blocks by kernels, where they serve it: float32 on the CPU."""
    first = tower.blocks[0]
    width, heads = first.norm1.normalized_shape[0], first.attn.num_heads
    shape = Shape(width // heads, heads, first.mlp.inner, first.norm1.eps)
    if dtype != torch.float32 or device.type != "cpu" or not shape.supported:
        return None
    return compiled_or_none(lambda: NativeBlocks(tower, shape))
