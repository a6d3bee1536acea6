"""Qwen2.5-VL's tower over a packed batch. Most blocks attend within windows, a few within whole images.

Patches leave `prepare` with the tokens of a window together, so nothing is reordered between the blocks; the rows are
put back at the end. Products and attention are compiled ones in float32 on the CPU, and torch's elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from lookonce.models.compiled import text_rows, tower_kernels
from lookonce.models.family import Grid, Patches
from lookonce.models.linear import Int8Linear, Linear, LinearModule, linear_of, replace_linears
from lookonce.models.omp_thread import Pause
from lookonce.models.qwen2_5_vl.modules import WindowTower, load_window_tower
from lookonce.models.qwen2_5_vl.windows import Windows, windows_of
from lookonce.models.qwen2_vl.modules import VISION_EPSILON, rms_norm
from lookonce.models.qwen2_vl.vision import PackedEncoder, attend_runs, patch_positions, row_linear, runs_of

_MLP_FLOATS = 1 << 22  # between the two layers of an MLP at once: they stay in the cache, and memory is used again
_AT_ONCE = 3e10  # operations of attention between two pauses
_LANES = 16  # compiled products have a multiple of so many columns

Attention = Callable[[torch.Tensor], torch.Tensor]
"""Queries, keys and values [patches, 3 * width] -> [patches, width]."""


@dataclass(frozen=True)
class BlockWeights:
    """Those of a pre-norm block."""

    norm1: torch.Tensor  # [width]
    norm2: torch.Tensor  # [width]
    qkv: Linear  # width -> 3 * width
    proj: Linear  # width -> width
    gate: Linear  # width -> inner
    up: Linear  # width -> inner
    down: Linear  # inner -> width
    full: bool  # its patches attend to the whole image

    def mlp(self, normed: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """SwiGLU of [T, width], and a residual."""
        return self.down.plus(functional.silu(self.gate(normed)).mul_(self.up(normed)), residual)


class WindowEncoder(PackedEncoder):
    """A loaded tower."""

    load_tower = staticmethod(load_window_tower)
    tower: WindowTower

    def prepare(self, image: Image.Image, min_pixels: int, max_pixels: int) -> Patches:
        patches = super().prepare(image, min_pixels, max_pixels)
        cells = patches.pixels.reshape(-1, self.merge_area, *patches.pixels.shape[1:])
        ordered = cells[self._windows(patches.grid_thw).order].reshape(patches.pixels.shape)
        return replace(patches, pixels=ordered)

    def _windows(self, grid_thw: Grid) -> Windows:
        (_, rows, columns), merge = grid_thw, self.tower.spatial_merge_size
        return windows_of(rows // merge, columns // merge, self.tower.window_side)

    def _positions(self, grid_thw: Grid) -> torch.Tensor:
        (_, rows, columns), tower = grid_thw, self.tower
        return _window_positions(rows, columns, tower.spatial_merge_size, tower.window_side)

    def _prepare_blocks(self, quantization: str, *, native: bool) -> list[Linear]:
        tower, blocks = self.tower, self.tower.blocks
        first = blocks[0]
        width, inner = first.attn.proj.weight.shape[0], first.mlp.down_proj.weight.shape[1]
        self._heads: int = first.attn.num_heads
        self._piece = max(1, _MLP_FLOATS // inner)
        head_width = width // self._heads
        self._kernels = tower_kernels(self._heads, head_width, inner, first.norm1.weight) if native else None
        self._lookup = self._kernels.lookup if self._kernels is not None else None
        rows = text_rows(width, head_width, 2 * self._heads, VISION_EPSILON, first.norm1.weight) if native else None
        self._norm = rows.norm if rows is not None else lambda x, weight: rms_norm(x, weight, VISION_EPSILON)
        missing = -inner % _LANES if self._kernels is not None and quantization == "none" else 0

        def make(child: nn.Linear) -> Linear:
            return row_linear(child.weight, child.bias, native=native)

        def quantised(child: nn.Linear) -> Linear:
            return Int8Linear(child.weight, child.bias) if quantization == "int8" else make(child)

        self._blocks = [
            _block(block, number in tower.full_blocks, quantised, missing) for number, block in enumerate(blocks)
        ]
        replace_linears(tower.merger, make)
        return [child.linear for child in tower.modules() if isinstance(child, LinearModule)]

    def _compute(
        self,
        hidden: torch.Tensor,
        batch: list[Patches],
        counts: list[int],
        rotary: tuple[torch.Tensor, torch.Tensor],
        pause: Pause,
    ) -> torch.Tensor:
        windows = [self._windows(patches.grid_thw) for patches in batch]
        within, whole = self._attention(windows, counts, rotary, pause)
        for block in self._blocks:
            projected = block.qkv(self._norm(hidden, block.norm1))
            pause()
            mixed = (whole if block.full else within)(projected)
            hidden = block.proj.plus(mixed, hidden)
            for rows in torch.split(hidden, self._piece):
                rows.copy_(block.mlp(self._norm(rows, block.norm2), rows))
                pause()
        merger = self.tower.merger
        tokens: torch.Tensor = merger.mlp(self._norm(hidden, merger.ln_q.weight).view(-1, merger.inner))
        return tokens.index_select(0, _back(windows).to(hidden.device))

    def _attention(
        self,
        windows: Sequence[Windows],
        counts: list[int],
        rotary: tuple[torch.Tensor, torch.Tensor],
        pause: Pause,
    ) -> tuple[Attention, Attention]:
        """Within windows, and within images of `counts` patches; what is behind the last window attends in pieces as
        large as one."""
        (cos, sin), area = rotary, self.merge_area
        sizes = [area * tokens for one in windows for tokens in one.counts]
        piece = area * self.tower.window_side**2
        missing = sum(counts) - sum(sizes)
        sizes += [min(piece, missing - begin) for begin in range(0, missing, piece)]
        if self._kernels is None:
            in_windows, in_images = runs_of(sizes), runs_of(counts)
            return (
                lambda qkv: attend_runs(qkv, self._heads, cos, sin, in_windows),
                lambda qkv: attend_runs(qkv, self._heads, cos, sin, in_images),
            )
        kernels, images = self._kernels, self._kernels.pack(counts, cos, sin)
        packed = replace(kernels.pack(sizes, cos, sin), heads=images.heads)
        return (
            lambda qkv: kernels.attend(qkv, packed, pause, at_once=_AT_ONCE),
            lambda qkv: kernels.attend(qkv, images, pause, at_once=_AT_ONCE),
        )


def _block(block: Any, full: bool, make: Callable[[nn.Linear], Linear], missing: int) -> BlockWeights:
    """A block's weights, its products as `make` makes them. `missing` places of its MLP, all zeros, are added; one
    matrix at a time, so that little more is in memory than what stays."""
    attention, mlp = block.attn, block.mlp
    replace_linears(attention, make)
    padding = {"gate_proj": (0, 0, 0, missing), "up_proj": (0, 0, 0, missing), "down_proj": (0, missing)}
    for name, places in padding.items():
        child = getattr(mlp, name)
        if missing:
            child.weight.data = functional.pad(child.weight.data, places)
            child.bias.data = functional.pad(child.bias.data, places[2:])
        setattr(mlp, name, LinearModule(make(child)))
    return BlockWeights(
        norm1=block.norm1.weight.data,
        norm2=block.norm2.weight.data,
        qkv=linear_of(attention.qkv),
        proj=linear_of(attention.proj),
        gate=linear_of(mlp.gate_proj),
        up=linear_of(mlp.up_proj),
        down=linear_of(mlp.down_proj),
        full=full,
    )


@lru_cache(maxsize=64)
def _window_positions(rows: int, columns: int, merge: int, side: int) -> torch.Tensor:
    """Row and column [rows * columns, 2] of each patch, windows together."""
    cells = patch_positions(rows, columns, merge).view(-1, merge**2, 2)
    return cells[torch.from_numpy(windows_of(rows // merge, columns // merge, side).order)].flatten(0, 1)


def _back(windows: Sequence[Windows]) -> torch.Tensor:
    """Where the tokens of a batch's images lie, each image's row by row."""
    begins = np.cumsum([0, *(len(one.back) for one in windows)])
    return torch.from_numpy(np.concatenate([one.back + begin for one, begin in zip(windows, begins, strict=False)]))
