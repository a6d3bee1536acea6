"""Qwen3-VL's tower over a packed batch. Rows are taken behind some of its blocks, too: the deepstack.

In float32 on the CPU products and attention are compiled ones; all else is torch's.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise

import torch

from lookonce.models.compiled import tower_kernels
from lookonce.models.family import Patches
from lookonce.models.linear import Int8Linear, Linear, LinearModule, linear_of, replace_linears
from lookonce.models.omp_thread import Pause
from lookonce.models.qwen2_vl.vision import PackedEncoder, attend_runs, patch_positions, row_linear, runs_of
from lookonce.models.qwen3_vl.modules import DeepstackTower, load_deepstack_tower

_MLP_FLOATS = 1 << 22  # between the two layers of an MLP at once: they stay in the cache, and memory is used again
_AT_ONCE = 3e10  # operations of attention between two pauses


class DeepstackEncoder(PackedEncoder):
    """A loaded tower. An embedding is [1 + deepstack, tokens, hidden]."""

    load_tower = staticmethod(load_deepstack_tower)
    tower: DeepstackTower

    def _prepare_blocks(self, quantization: str, *, native: bool) -> list[Linear]:
        tower, first = self.tower, self.tower.blocks[0]
        width, inner = first.attn.proj.weight.shape[0], first.mlp.inner
        self._heads: int = first.attn.num_heads
        self._piece = max(1, _MLP_FLOATS // inner)
        self._kernels = tower_kernels(self._heads, width // self._heads, inner, first.norm1.weight) if native else None
        self._lookup = self._kernels.lookup if self._kernels is not None else None
        self._levels = dict(zip(tower.deepstack_blocks, tower.deepstack_merger_list, strict=True))
        if quantization == "int8":
            replace_linears(tower.blocks, lambda child: Int8Linear(child.weight, child.bias))
        replace_linears(tower, lambda child: row_linear(child.weight, child.bias, native=native))
        return [child.linear for child in tower.modules() if isinstance(child, LinearModule)]

    def _compute(
        self,
        hidden: torch.Tensor,
        batch: list[Patches],
        counts: list[int],
        rotary: tuple[torch.Tensor, torch.Tensor],
        pause: Pause,
    ) -> torch.Tensor:
        tower, levels = self.tower, list[torch.Tensor]()
        self._add_positions(hidden, batch)
        runs = runs_of(counts)
        packed = self._kernels.pack(counts, *rotary) if self._kernels is not None else None
        for number, block in enumerate(tower.blocks):
            projected = block.attn.qkv(block.norm1(hidden))
            pause()
            if self._kernels is not None and packed is not None:
                mixed = self._kernels.attend(projected, packed, pause, at_once=_AT_ONCE)
            else:
                mixed = attend_runs(projected, self._heads, *rotary, runs)
            hidden = linear_of(block.attn.proj).plus(mixed, hidden)
            for rows in torch.split(hidden, self._piece):
                rows += block.mlp(block.norm2(rows))
                pause()
            if number in self._levels:
                levels.append(self._levels[number](hidden))
        return torch.stack([tower.merger(hidden), *levels])

    def _add_positions(self, hidden: torch.Tensor, batch: list[Patches]) -> None:
        """Add to each patch what the learned positions have at its place: they span every image."""
        table, merge = self.tower.pos_embed.weight, self.tower.spatial_merge_size
        side = math.isqrt(len(table))
        ends = [0, *torch.tensor([patches.count for patches in batch]).cumsum(0).tolist()]
        for patches, (begin, end) in zip(batch, pairwise(ends), strict=True):
            places, weights = place_weights(*patches.grid_thw[1:], merge, side)
            learned = torch.zeros(end - begin, table.shape[1], device=hidden.device)
            for place, weight in zip(places.to(hidden.device), weights.to(hidden.device), strict=True):
                learned.addcmul_(table.index_select(0, place).float(), weight[:, None])
            hidden[begin:end] += learned.to(hidden.dtype)


@lru_cache(maxsize=64)
def place_weights(height: int, width: int, merge: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each patch the four places [4, patches] of a table of side x side that it lies between, and their weights:
    the corners of the table are those of the image (bilinear, align_corners)."""
    places, weights = [], []
    for at, length in zip(patch_positions(height, width, merge).t(), (height, width), strict=True):
        exact = at.float() * (side - 1) / max(length - 1, 1)
        low = exact.floor().long()
        places.append(torch.stack([low, (low + 1).clamp(max=side - 1)]))
        weights.append(torch.stack([1 - (exact - low), exact - low]))
    (down, across), (high, wide) = places, weights
    return (down[:, None] * side + across).flatten(0, 1), (high[:, None] * wide).flatten(0, 1)
