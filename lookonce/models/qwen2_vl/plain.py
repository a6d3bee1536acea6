"""Qwen2-VL's halves in their plain form (arXiv:2409.12191)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from lookonce.models.checkpoint.checkpoint import Checkpoint
from lookonce.models.family import Half
from lookonce.models.plain import PlainPrompt, Weights, attended, rms_normed, rotated
from lookonce.models.qwen2_vl.rope import STRETCHED, frequencies, mrope_section, rope_of, rope_type

Angles = tuple[torch.Tensor, float]
"""[T, d / 2], and what their cosines and sines are multiplied by."""
_EPSILON = 1e-6  # of the tower's norms


class PlainQwen2VL:
    """A `Plain`. Another tower of this line overrides `block` and `merged`."""

    width = "embed_dim"  # of the vision config: the tower's

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self._checkpoint, self._dtype = checkpoint, dtype
        self.vision = checkpoint.family.vision_config(checkpoint.config)
        self.text = checkpoint.family.text_config(checkpoint.config)

    @torch.inference_mode()
    def rows(self, image: Image.Image) -> torch.Tensor:
        """See `Plain`."""
        weights = Weights(self._checkpoint, Half.VISION, self._dtype)
        merge = self.vision["spatial_merge_size"]
        pixels = self._pixels(image)
        rows, columns = (side // self.vision["patch_size"] for side in pixels.shape[1:])
        place = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        cell = (place // merge) @ torch.tensor([columns, 1])
        place = place[cell.argsort(stable=True)]  # a cell's patches follow each other
        x = weights.linear("patch_embed.proj", self._patches(pixels, place))
        head_dim = self.vision[self.width] // self.vision["num_heads"]
        angles = (place[:, :, None] * _frequencies(head_dim // 2, self.vision["rope_theta"])).flatten(1)
        return self.computed(weights, x, angles, place)

    def computed(self, weights: Weights, x: torch.Tensor, angles: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """From patches [patches, width] at places [patches, 2] to rows."""
        for number in range(self.vision["depth"]):
            x = self.block(weights, number, x, angles, place)
        return self.merged(weights, x)

    def block(
        self, weights: Weights, number: int, x: torch.Tensor, angles: torch.Tensor, place: torch.Tensor
    ) -> torch.Tensor:
        """A block of the tower: LayerNorm, attention over the image, an MLP with QuickGELU."""
        name = f"blocks.{number}"
        x = x + self.attention(weights, f"{name}.attn", layer_normed(weights, f"{name}.norm1", x), angles, None)
        inner = weights.linear(f"{name}.mlp.fc1", layer_normed(weights, f"{name}.norm2", x))
        return x + weights.linear(f"{name}.mlp.fc2", inner * torch.sigmoid(1.702 * inner))

    def attention(
        self, weights: Weights, name: str, x: torch.Tensor, angles: torch.Tensor, seen: torch.Tensor | None
    ) -> torch.Tensor:
        """The tower's, projected."""
        q, k, v = weights.linear(f"{name}.qkv", x).view(len(x), 3, self.vision["num_heads"], -1).unbind(1)
        return weights.linear(f"{name}.proj", attended(rotated(q, angles), rotated(k, angles), v, seen))

    def merged(self, weights: Weights, x: torch.Tensor) -> torch.Tensor:
        """[patches, width] -> [tokens, hidden]."""
        return self.projected(weights, layer_normed(weights, "merger.ln_q", x))

    def projected(self, weights: Weights, x: torch.Tensor) -> torch.Tensor:
        """The merger's two matrices over normed patches."""
        cells = x.view(-1, x.shape[1] * self.vision["spatial_merge_size"] ** 2)
        return weights.linear("merger.mlp.2", functional.gelu(weights.linear("merger.mlp.0", cells)))

    @torch.inference_mode()
    def logits(self, prompts: Sequence[PlainPrompt]) -> list[torch.Tensor]:
        """See `Plain`."""
        rows, weights = self.rows_for_head(prompts), Weights(self._checkpoint, Half.LANGUAGE, self._dtype)
        found = weights.vocabulary_logits(torch.cat(rows))
        return list(torch.split(found, [prompt.last for prompt in prompts]))

    @torch.inference_mode()
    def rows_for_head(self, prompts: Sequence[PlainPrompt]) -> list[torch.Tensor]:
        """See `PlainVectors`."""
        weights = Weights(self._checkpoint, Half.LANGUAGE, self._dtype)
        epsilon = float(self.text.get("rms_norm_eps", 1e-5))
        turns = [self.angles(prompt.positions) for prompt in prompts]
        states = [weights.embedded(prompt) for prompt in prompts]
        lengths = [len(state) for state in states]
        x = torch.cat(states)
        for number in range(self.text["num_hidden_layers"]):
            name = f"model.layers.{number}"
            normed = rms_normed(x, weights(f"{name}.input_layernorm.weight"), epsilon)
            q, k, v = (torch.split(weights.linear(f"{name}.self_attn.{part}_proj", normed), lengths) for part in "qkv")
            mixed = [
                self.self_attended(weights, f"{name}.self_attn", *each) for each in zip(q, k, v, turns, strict=True)
            ]
            x = x + weights.linear(f"{name}.self_attn.o_proj", torch.cat(mixed))
            normed = rms_normed(x, weights(f"{name}.post_attention_layernorm.weight"), epsilon)
            x = x + self.mlp(weights, f"{name}.mlp", normed)
            for part, prompt in zip(torch.split(x, lengths), prompts, strict=True):
                if number + 1 < len(prompt.rows):  # a level of the deepstack
                    level = prompt.rows[number + 1].to(self._dtype).float()
                    part[prompt.start : prompt.start + len(level)] += level
        wanted = torch.cat([x[-prompt.last :] for x, prompt in zip(torch.split(x, lengths), prompts, strict=True)])
        found = self.projected_rows(weights, rms_normed(wanted, weights("model.norm.weight"), epsilon))
        return list(torch.split(found, [prompt.last for prompt in prompts]))

    def projected_rows(self, weights: Weights, rows: torch.Tensor) -> torch.Tensor:
        """Of a model with a projection before its vectors: here as they are."""
        return rows

    def mlp(self, weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
        """SwiGLU of [T, hidden]."""
        gate, up = (weights.linear(f"{name}.{part}_proj", x) for part in ("gate", "up"))
        return weights.linear(f"{name}.down_proj", functional.silu(gate) * up)

    def angles(self, positions: torch.Tensor) -> Angles:
        """Each section of the frequencies follows its own row of the positions [3, T]."""
        found, scale = self.frequencies(self.text["hidden_size"] // self.text["num_attention_heads"], 1e6)
        parts = torch.split(found, mrope_section(self.text))
        return torch.cat([positions[row % 3, :, None] * part for row, part in enumerate(parts)], dim=-1), scale

    def frequencies(self, width: int, theta: float) -> tuple[torch.Tensor, float]:
        """Of a head of the text model, and what cosines and sines are multiplied by."""
        rope = rope_of(self.text)
        if rope_type(rope) in STRETCHED:
            return frequencies(self.text, width, theta)
        return _frequencies(width, float(rope.get("rope_theta") or self.text.get("rope_theta") or theta)), 1.0

    def self_attended(
        self, weights: Weights, name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, turns: Angles
    ) -> torch.Tensor:
        """Causal attention of one prompt, by projected queries, keys and values -> [T, heads * d]."""
        angles, scale = turns
        q, k, v = (x.view(len(x), -1, 2 * angles.shape[1]) for x in (q, k, v))
        q, k = (
            scale * rotated(self.head_normed(weights, f"{name}.{part}_norm", x), angles)
            for part, x in (("q", q), ("k", k))
        )
        return attended(q, k, v, torch.ones(len(q), len(q)).tril().bool())

    def head_normed(self, weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
        """Queries or keys [T, heads, d] before they are rotated: here as they are."""
        return x

    def _pixels(self, image: Image.Image) -> torch.Tensor:
        """[3, height, width] as the tower is told them."""
        settings = self._checkpoint.preprocessor
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1).double()
        if settings["do_rescale"]:
            x = x * settings["rescale_factor"]
        if settings["do_normalize"]:
            mean, deviation = (torch.tensor(settings[f"image_{name}"]).view(-1, 1, 1) for name in ("mean", "std"))
            x = (x - mean) / deviation
        return x.to(self._dtype).float()

    def _patches(self, pixels: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """[patches, numbers] in the order of their places: channels, then equal frames, then the pixels."""
        side, frames = self.vision["patch_size"], self.vision["temporal_patch_size"]
        cut = [pixels[:, side * row : side * (row + 1), side * column : side * (column + 1)] for row, column in place]
        return torch.stack(cut)[:, :, None].expand(-1, -1, frames, -1, -1).flatten(1)


def _frequencies(width: int, theta: float) -> torch.Tensor:
    """[width / 2]: theta^(-2i / width) (RoFormer, arXiv:2104.09864)."""
    return 1.0 / theta ** (torch.arange(0, width, 2).float() / width)


def layer_normed(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return functional.layer_norm(x, x.shape[1:], weights(f"{name}.weight"), weights(f"{name}.bias"), _EPSILON)
