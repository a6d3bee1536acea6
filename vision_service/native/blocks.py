"""The tower's blocks and merger with compiled kernels between torch's matrix products."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lookonce.checkpoint.lean import VisionTower
from lookonce.native.compiling import compiled_or_none
from vision_service.native.kernels import Kernels, Shape

_MLP_FLOATS = 1 << 22  # between the two layers of an MLP at once: they stay in the cache, and memory is used again


class NativeBlocks:
    """Called from one thread at a time."""

    def __init__(self, tower: VisionTower, shape: Shape) -> None:
        self._tower, self.kernels = tower, Kernels(shape)
        self._rows = max(1, _MLP_FLOATS // shape.inner)

    def __call__(
        self, hidden: torch.Tensor, counts: Sequence[int], cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """Embedded patches [patches, width] of pictures with so many each -> [tokens, hidden]; `hidden` is overwritten.
        Cosines and sines are [patches, 1, d / 2]."""
        kernels, merger = self.kernels, self._tower.merger
        packed, blocks = kernels.pack(counts, cos, sin), list(self._tower.blocks)
        following = [block.norm1 for block in blocks[1:]] + [merger.ln_q]
        normed = kernels.norm(hidden, blocks[0].norm1)
        for block, norm in zip(blocks, following, strict=True):
            mixed = kernels.attend(block.attn.qkv(normed), packed)
            kernels.add_norm(hidden, block.attn.proj(mixed), block.norm2, normed)
            for some, part in zip(*(torch.split(x, self._rows) for x in (hidden, normed)), strict=True):
                inner = kernels.gelu(block.mlp.fc1(part))
                kernels.add_norm(some, block.mlp.fc2(inner), norm, part)
        tokens: torch.Tensor = merger.mlp(normed.view(-1, merger.inner))
        return tokens


def blocks_for(tower: VisionTower, dtype: torch.dtype, device: torch.device) -> NativeBlocks | None:
    """The blocks by kernels, where they serve it: float32 on the CPU."""
    first = tower.blocks[0]
    width, heads = first.norm1.normalized_shape[0], first.attn.num_heads
    shape = Shape(width // heads, heads, first.mlp.inner, first.norm1.eps)
    if dtype != torch.float32 or device.type != "cpu" or not shape.supported:
        return None
    return compiled_or_none(lambda: NativeBlocks(tower, shape))
