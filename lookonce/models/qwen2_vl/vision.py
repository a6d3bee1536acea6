"""A vision tower over a packed batch: images of any sizes end to end in one sequence, no padding, no mask.

Attention runs per image; everything else runs over the whole batch. In float32 on the CPU compiled kernels do it
(`native`); elsewhere torch's operations do, images with equally many patches attending together.
The patch embedding, a convolution whose kernel equals its stride, is computed as the matrix product it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import accumulate, groupby
from typing import ClassVar, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional

from lookonce.models.checkpoint import Checkpoint
from lookonce.models.compiled import panel_linear, vision_blocks
from lookonce.models.family import Grid, Patches
from lookonce.models.linear import (
    Int8Linear,
    Linear,
    LinearModule,
    OneDnnLinear,
    PlainLinear,
    VisionBlockWeights,
    linear_of,
    onednn_pays,
    replace_linears,
    rounded_up,
)
from lookonce.models.omp_thread import Pause
from lookonce.models.qwen2_vl.modules import Tower, VisionBlock, load_vision_tower
from lookonce.models.qwen2_vl.preprocessing import CHANNELS, Preprocessor

Run = tuple[int, int]  # images in a row with equally many patches: how many images, how many patches each
Lookup = Callable[[NDArray[np.uint8], torch.Tensor], torch.Tensor]
"""Pixels [patches, 3, places] and the table of their values -> [patches, 3 * places]."""


class PackedEncoder(ABC):
    """A loaded tower; its blocks are the subclass's. `encode` is called from one thread at a time."""

    load_tower: ClassVar[Callable[..., Tower]]
    """(checkpoint, dtype, device) -> the vision half."""

    def __init__(
        self,
        tower: Tower,
        preprocessor: Preprocessor,
        *,
        dtype: torch.dtype,
        device: torch.device,
        quantization: str = "none",
        native: bool = True,
    ) -> None:
        """`quantization` ("none", "int8") is that of the blocks' matrices; `native`: use compiled kernels where there
        are some for this tower."""
        self.tower = tower
        self.dtype = dtype
        self.device = device
        self.merge_area = preprocessor.merge**2
        self._preprocessor = preprocessor
        self._table = torch.from_numpy(preprocessor.table).reshape(-1).to(device, dtype)  # [3 * 256]
        self._offsets = (256 * torch.arange(CHANNELS, dtype=torch.int32, device=device))[:, None]
        self._frequencies = tower.rotary_frequencies.to(device)
        self._frames, self._project = _projection(tower.patch_embed.proj, native=native)
        self._lookup: Lookup | None = None  # of compiled kernels
        matrices = [self._project, *self._prepare_blocks(quantization, native=native)]
        self._rounds = device.type == "cpu" and any(matrix.per_row_count for matrix in matrices)

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        *,
        quantization: str = "none",
        native: bool = True,
    ) -> Self:
        """As `Family.load_encoder`."""
        tower, preprocessor = cls.load_tower(checkpoint, dtype, device), Preprocessor(checkpoint.preprocessor)
        return cls(tower, preprocessor, dtype=dtype, device=device, quantization=quantization, native=native)

    @abstractmethod
    def _prepare_blocks(self, quantization: str, *, native: bool) -> list[Linear]:
        """Lay the blocks and the merger out as they are computed; the products that they have then. Sets `_lookup`
        where kernels serve."""

    @abstractmethod
    def _compute(
        self,
        hidden: torch.Tensor,
        batch: list[Patches],
        counts: list[int],
        rotary: tuple[torch.Tensor, torch.Tensor],
        pause: Pause,
    ) -> torch.Tensor:
        """Embedded patches [patches, width], `counts` of each image -> tokens [tokens, hidden], or one more for each
        level of a deepstack. Behind those of `batch` there may be one more count."""

    @property
    def native(self) -> bool:
        """Whether compiled kernels serve."""
        return self._lookup is not None

    @torch.inference_mode()
    def encode(self, batch: Sequence[Patches], pause: Pause = lambda: None) -> list[torch.Tensor]:
        """Embeddings of each image, in order: [tokens, hidden], or with a deepstack [1 + deepstack, tokens, hidden], on
        the CPU in the compute dtype. `pause` is called between the blocks of the tower, and within them where they take
        long; it may encode another batch."""
        order = sorted(range(len(batch)), key=lambda index: batch[index].count)
        packed = [batch[index] for index in order]
        rows = self._forward(packed, pause).to("cpu")
        tokens = sum(patches.count for patches in packed) // self.merge_area
        counts = [patches.count // self.merge_area for patches in packed]
        parts = torch.split(rows.narrow(-2, 0, tokens), counts, dim=-2)
        results: list[torch.Tensor] = [rows] * len(batch)
        for index, part in zip(order, parts, strict=True):
            results[index] = part
        return results

    def prepare(self, image: Image.Image, min_pixels: int, max_pixels: int) -> Patches:
        return self._preprocessor(image, min_pixels, max_pixels)

    def warm_up(self) -> None:
        """Encode one small image, so that lazy initialisation isn't paid for by the first request."""
        side = self._preprocessor.factor
        self.encode([self.prepare(Image.new("RGB", (side, side)), side**2, side**2)])

    def _forward(self, batch: list[Patches], pause: Pause) -> torch.Tensor:
        """What `_compute` makes of all images, and further rows: where a product is compiled for each number of rows,
        there is one more image, of as many patches as make their number a round one."""
        counts = [patches.count for patches in batch]
        missing = rounded_up(sum(counts)) - sum(counts) if self._rounds else 0
        missing += -missing % self.merge_area
        counts += [missing] if missing else []
        return self._compute(self._embed(batch, missing), batch, counts, self._rotary(batch, missing), pause)

    def _positions(self, grid_thw: Grid) -> torch.Tensor:
        """Row and column [patches, 2] of an image's patches, in the order they are in."""
        return patch_positions(*grid_thw[1:], self.tower.spatial_merge_size)

    def _rotary(self, batch: list[Patches], missing: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [patches of all, 1, head width / 2], float32: of the row first, then of the column."""
        positions = torch.cat([self._positions(patches.grid_thw) for patches in batch]).to(self.device)
        positions = functional.pad(positions, (0, 0, 0, missing))
        angles = (positions[:, :, None].float() * self._frequencies).flatten(1)
        return angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)

    def _embed(self, batch: list[Patches], missing: int) -> torch.Tensor:
        """[patches of all, width]."""
        parts = [patches.pixels for patches in batch]
        if missing:
            parts.append(np.zeros_like(parts[0], shape=(missing, *parts[0].shape[1:])))
        pixels = np.concatenate(parts) if len(parts) > 1 else parts[0]
        if self._lookup is not None:
            values = self._lookup(pixels, self._table)
        else:
            index = torch.from_numpy(pixels).to(self.device).to(torch.int32) + self._offsets
            values = self._table.index_select(0, index.view(-1))
        values = values.view(len(pixels), CHANNELS, 1, -1)
        return self._project(values.expand(-1, -1, self._frames, -1).reshape(len(pixels), -1))


class Encoder(PackedEncoder):
    """Qwen2-VL's."""

    load_tower = staticmethod(load_vision_tower)

    def _prepare_blocks(self, quantization: str, *, native: bool) -> list[Linear]:
        tower = self.tower
        if quantization == "int8":
            replace_linears(tower.blocks, lambda child: Int8Linear(child.weight, child.bias))
        replace_linears(tower, lambda child: row_linear(child.weight, child.bias, native=native))
        self._blocks = None
        if native:
            heads = tower.blocks[0].attn.num_heads
            self._blocks = vision_blocks([_weights(block) for block in tower.blocks], tower.merger.ln_q, heads)
        self._lookup = self._blocks.kernels.lookup if self._blocks is not None else None
        return [child.linear for child in tower.modules() if isinstance(child, LinearModule)]

    def _compute(
        self,
        hidden: torch.Tensor,
        batch: list[Patches],
        counts: list[int],
        rotary: tuple[torch.Tensor, torch.Tensor],
        pause: Pause,
    ) -> torch.Tensor:
        tower, (cos, sin) = self.tower, rotary
        if self._blocks is not None:
            normed = self._blocks(hidden, counts, cos, sin, pause).view(-1, tower.merger.inner)
            tokens: torch.Tensor = tower.merger.mlp(normed)
            return tokens
        runs = runs_of(counts)
        for block in tower.blocks:
            attention = block.attn
            mixed = attend_runs(attention.qkv(block.norm1(hidden)), attention.num_heads, cos, sin, runs)
            hidden = hidden + attention.proj(mixed)
            hidden = hidden + block.mlp(block.norm2(hidden))
            pause()
        merged: torch.Tensor = tower.merger(hidden)
        return merged


def _projection(convolution: torch.nn.Conv3d, *, native: bool) -> tuple[int, Linear]:
    """The product with a kernel [width, 3, frames, patch, patch], and how many frames of an image it takes. They are
    all the same: in float32 their weights are added up; narrower ones would be rounded by that."""
    kernel = convolution.weight.data
    frames = kernel.shape[2]
    if kernel.dtype == torch.float32:
        frames, kernel = 1, kernel.sum(2)
    return frames, row_linear(kernel.flatten(1), convolution.bias, native=native)


def row_linear(weight: torch.Tensor, bias: torch.Tensor | None, *, native: bool) -> Linear:
    """The fastest for a matrix [out, in] in which a row's numbers do not depend on how many there are."""
    if native and (compiled := panel_linear(weight, bias)):
        return compiled
    if weight.dtype == torch.float32 and onednn_pays(weight):
        return OneDnnLinear(weight, bias, pairs=True)
    return PlainLinear(weight, bias)


def _weights(block: VisionBlock) -> VisionBlockWeights:
    qkv, proj, fc1, fc2 = map(linear_of, (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2))
    return VisionBlockWeights(block.norm1, qkv, proj, block.norm2, fc1, fc2, block.mlp.inner)


@lru_cache(maxsize=64)
def patch_positions(height: int, width: int, merge: int) -> torch.Tensor:
    """Row and column [height * width, 2] of each patch, in the order that keeps merge cells together."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    cells = (height // merge, merge, width // merge, merge)
    return torch.stack([axis.reshape(cells).transpose(1, 2).flatten() for axis in (rows, columns)], dim=-1)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [patches, heads, head width] in float32; the two halves of the width are the coordinates."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def runs_of(counts: Iterable[int]) -> list[Run]:
    """Of images, or of windows, with so many patches each."""
    return [(len(list(group)), count) for count, group in groupby(counts)]


def attend_runs(
    qkv: torch.Tensor, heads: int, cos: torch.Tensor, sin: torch.Tensor, runs: Iterable[Run]
) -> torch.Tensor:
    """[patches, 3 * width] -> [patches, width]: the patches of each image of a run attend to each other."""
    query, key, value = qkv.view(len(qkv), 3, heads, -1).unbind(1)  # each [patches, heads, head width]
    query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
    if has_varlen(qkv):
        return attend_varlen(query, key, value, runs)
    outputs = []
    start = 0
    for images, patches in runs:
        end = start + images * patches
        q, k, v = (x[start:end].view(images, patches, heads, -1).transpose(1, 2) for x in (query, key, value))
        mixed = functional.scaled_dot_product_attention(q, k, v)
        outputs.append(mixed.transpose(1, 2).reshape(images * patches, -1))
        start = end
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def has_varlen(x: torch.Tensor) -> bool:
    """Whether torch has one kernel for images of all sizes there: on GPUs, in half precision, from torch 2.11 on."""
    return x.device.type == "cuda" and x.dtype in (torch.bfloat16, torch.float16) and _varlen_attn() is not None


@lru_cache(maxsize=1)
def _varlen_attn() -> Callable[..., torch.Tensor] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return cast(Callable[..., torch.Tensor], varlen_attn)


def attend_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    runs: Iterable[Run],
    kernel: Callable[..., torch.Tensor] | None = None,
) -> torch.Tensor:
    """[patches, heads, head width] each -> [patches, width], by one call for all images: those of each run attend to
    themselves. `kernel` has the arguments of torch.nn.attention.varlen.varlen_attn, which is taken unless given."""
    ends, longest = _ends(tuple(runs), query.device)
    attend = kernel or _varlen_attn()
    if attend is None:
        raise RuntimeError("torch has no varlen_attn")
    mixed = attend(query, key, value.contiguous(), ends, ends, longest, longest)
    return mixed.reshape(len(query), -1)


@lru_cache(maxsize=8)
def _ends(runs: tuple[Run, ...], device: torch.device) -> tuple[torch.Tensor, int]:
    """Where images begin and the last one ends, int32 [images + 1], the same for all blocks; the most patches."""
    lengths = [patches for images, patches in runs for _ in range(images)]
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device), max(lengths)
