"""Qwen2-VL in lean PyTorch, under the published parameter names, for training many questions per encoded image.

Same arithmetic as transformers' Qwen2VLForConditionalGeneration (tests/training compares the logits); a batch holds
images of one grid, and a mask says which token may look at which.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape2VL:
    """Sizes of the model; `hf_config` in export.py writes the same as a published config.json."""

    vocab: int = 768
    vision_dim: int = 128
    vision_depth: int = 4
    vision_heads: int = 4
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    ffn: int = 384
    rope_theta: float = 10000.0
    mrope: tuple[int, int, int] = (2, 7, 7)
    eps: float = 1e-6


def layers_of(state: Mapping[str, Tensor]) -> int:
    """How many language layers a whole state has."""
    return 1 + max(int(name.split(".")[2]) for name in state if name.startswith("model.layers."))


def rotate_half(x: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.cat((-right, left), dim=-1)


class PatchEmbed(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.proj = nn.Conv3d(3, dim, (2, 14, 14), (2, 14, 14), bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """[..., 588] of one frame; a still image is the same frame twice, so the two time slices' weights add up."""
        return F.linear(pixels, self.proj.weight.sum(2).flatten(1))


class VisionAttention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, dim))


class VisionMlp(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class VisionBlock(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = VisionAttention(dim, heads), VisionMlp(dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.ln_q = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(4 * dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, hidden))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        return self.mlp(self.ln_q(x).view(batch, length // 4, 4 * dim))


class Vision(nn.Module):
    """The `visual.*` half: patches of one grid to image tokens."""

    def __init__(self, sizes: Shape2VL):
        super().__init__()
        self.head_dim = sizes.vision_dim // sizes.vision_heads
        self.patch_embed = PatchEmbed(sizes.vision_dim)
        self.blocks = nn.ModuleList(
            VisionBlock(sizes.vision_dim, sizes.vision_heads) for _ in range(sizes.vision_depth)
        )
        self.merger = Merger(sizes.vision_dim, sizes.hidden)

    def rotary(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        rows, columns = grid
        frequencies = 1.0 / (10000.0 ** (torch.arange(0, self.head_dim // 2, 2).float() / (self.head_dim // 2)))
        y = torch.arange(rows * 2).view(rows, 2, 1, 1).expand(rows, 2, columns, 2).transpose(1, 2).reshape(-1)
        x = torch.arange(columns * 2).view(1, 1, columns, 2).expand(rows, 2, columns, 2).transpose(1, 2).reshape(-1)
        angles = torch.cat((y[:, None] * frequencies, x[:, None] * frequencies), dim=-1).repeat(1, 2)
        return angles.cos(), angles.sin()

    def features(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patch features [batch, patches, vision_dim] before merging."""
        cos, sin = self.rotary(grid)
        x = self.patch_embed(pixels)
        for block in self.blocks:
            x = block(x, cos, sin)
        return x

    def forward(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        """float [batch, 4 * rows * columns, 588] to image tokens [batch, rows * columns, hidden]."""
        return self.merger(self.features(pixels, grid))


class Attention(nn.Module):
    def __init__(self, sizes: Shape2VL):
        super().__init__()
        self.heads, self.kv_heads = sizes.heads, sizes.kv_heads
        head = sizes.hidden // sizes.heads
        self.q_proj = nn.Linear(sizes.hidden, sizes.hidden)
        self.k_proj = nn.Linear(sizes.hidden, sizes.kv_heads * head)
        self.v_proj = nn.Linear(sizes.hidden, sizes.kv_heads * head)
        self.o_proj = nn.Linear(sizes.hidden, sizes.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q = self.q_proj(x).view(batch, length, self.heads, -1).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.kv_heads, -1).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.kv_heads, -1).transpose(1, 2)
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        repeats = self.heads // self.kv_heads
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, dim))


class Mlp(nn.Module):
    def __init__(self, dim: int, ffn: int):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(dim, ffn, bias=False), nn.Linear(dim, ffn, bias=False)
        self.down_proj = nn.Linear(ffn, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, sizes: Shape2VL):
        super().__init__()
        self.self_attn, self.mlp = Attention(sizes), Mlp(sizes.hidden, sizes.ffn)
        self.input_layernorm = nn.RMSNorm(sizes.hidden, eps=sizes.eps)
        self.post_attention_layernorm = nn.RMSNorm(sizes.hidden, eps=sizes.eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, keep: Tensor | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        x = x if keep is None else x[keep]
        return x + self.mlp(self.post_attention_layernorm(x))


class Language(nn.Module):
    """The `model.*` half: embeddings with positions and a mask to hidden states."""

    def __init__(self, sizes: Shape2VL):
        super().__init__()
        self.sizes = sizes
        self.embed_tokens = nn.Embedding(sizes.vocab, sizes.hidden)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.hidden, eps=sizes.eps)

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [3, batch, length] (time, row, column) to cos, sin [batch, 1, length, head]."""
        half = self.sizes.hidden // self.sizes.heads // 2
        frequencies = 1.0 / (self.sizes.rope_theta ** (torch.arange(half).float() / half))
        angles = positions[..., None].float() * frequencies
        pieces = angles.split(list(self.sizes.mrope), dim=-1)
        angles = torch.cat([piece[axis] for axis, piece in enumerate(pieces)], dim=-1).repeat(1, 1, 2)
        return angles.cos()[:, None], angles.sin()[:, None]

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor, keep: Tensor | None = None, inputs: list[Tensor] | None = None
    ) -> Tensor:
        """Hidden states [batch, length, hidden]; with keep (bool [batch, length]) only those, [kept, hidden].

        inputs: a list that receives what each layer but the last was given.
        """
        cos, sin = self.rotary(positions)
        for layer in self.layers[:-1]:
            if inputs is not None:
                inputs.append(x)
            x = layer(x, cos, sin, mask)
        return self.norm(self.layers[-1](x, cos, sin, mask, keep))


class Qwen2VL(nn.Module):
    """Whole model; `state_dict()` has the published names."""

    def __init__(self, sizes: Shape2VL):
        super().__init__()
        self.sizes = sizes
        self.visual = Vision(sizes)
        self.model = Language(sizes)
        self.lm_head = nn.Linear(sizes.hidden, sizes.vocab, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.7 * module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.model.embed_tokens.weight, std=0.5)
        nn.init.normal_(self.lm_head.weight, std=0.02)
        nn.init.normal_(self.visual.patch_embed.proj.weight, std=0.5 * 588**-0.5)

    def embed(self, ids: Tensor, image_at: Tensor, image_tokens: Tensor) -> Tensor:
        """ids [batch, length]; image_at bool, as many places a row as image_tokens [batch, n, hidden] has rows."""
        x = self.model.embed_tokens(ids)
        return x.masked_scatter(image_at[..., None], image_tokens.to(x.dtype))
