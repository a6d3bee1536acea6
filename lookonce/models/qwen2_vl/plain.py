"""Qwen2-VL's halves in their plain form (arXiv:2409.12191)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from lookonce.models.checkpoint.checkpoint import Checkpoint
from lookonce.models.family import Half
from lookonce.models.plain import PlainPrompt, Weights, attended, rms_normed, rotated

_EPSILON = 1e-6  # of the tower's norms


class PlainQwen2VL:
    """A `Plain`. Another tower of this line overrides `block` and `merged`."""

    width = "embed_dim"  # of the vision config: the tower's

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self._checkpoint, self._dtype = checkpoint, dtype
        self.vision = checkpoint.family.vision_config(checkpoint.config)

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
        x = self._patches(pixels, place) @ weights("patch_embed.proj.weight").flatten(1).T
        head_dim = self.vision[self.width] // self.vision["num_heads"]
        frequencies = _frequencies(head_dim // 2, self.vision["rope_theta"])
        angles = (place[:, :, None] * frequencies).flatten(1)
        for number in range(self.vision["depth"]):
            x = self.block(weights, number, x, angles, place)
        return self.merged(weights, x)

    def block(
        self, weights: Weights, number: int, x: torch.Tensor, angles: torch.Tensor, place: torch.Tensor
    ) -> torch.Tensor:
        """A block of the tower: LayerNorm, attention over the image, an MLP with QuickGELU."""
        name = f"blocks.{number}"
        x = x + self.attention(weights, f"{name}.attn", _layer_normed(weights, f"{name}.norm1", x), angles, None)
        inner = weights.linear(f"{name}.mlp.fc1", _layer_normed(weights, f"{name}.norm2", x))
        return x + weights.linear(f"{name}.mlp.fc2", inner * torch.sigmoid(1.702 * inner))

    def attention(
        self, weights: Weights, name: str, x: torch.Tensor, angles: torch.Tensor, seen: torch.Tensor | None
    ) -> torch.Tensor:
        """The tower's, projected."""
        q, k, v = weights.linear(f"{name}.qkv", x).view(len(x), 3, self.vision["num_heads"], -1).unbind(1)
        return weights.linear(f"{name}.proj", attended(rotated(q, angles), rotated(k, angles), v, seen))

    def merged(self, weights: Weights, x: torch.Tensor) -> torch.Tensor:
        """[patches, width] -> [tokens, hidden]."""
        return self.projected(weights, _layer_normed(weights, "merger.ln_q", x))

    def projected(self, weights: Weights, x: torch.Tensor) -> torch.Tensor:
        """The merger's two matrices over normed patches."""
        cells = x.view(-1, x.shape[1] * self.vision["spatial_merge_size"] ** 2)
        return weights.linear("merger.mlp.2", functional.gelu(weights.linear("merger.mlp.0", cells)))

    @torch.inference_mode()
    def logits(self, prompts: Sequence[PlainPrompt]) -> list[torch.Tensor]:
        """See `Plain`."""
        weights = Weights(self._checkpoint, Half.LANGUAGE, self._dtype)
        config = self._checkpoint.family.text_config(self._checkpoint.config)
        epsilon = float(config.get("rms_norm_eps", 1e-5))
        angles = [_mrope_angles(config, prompt.positions) for prompt in prompts]
        states = [weights.embedded(prompt) for prompt in prompts]
        lengths = [len(state) for state in states]
        x = torch.cat(states)
        for number in range(config["num_hidden_layers"]):
            name = f"model.layers.{number}"
            normed = rms_normed(x, weights(f"{name}.input_layernorm.weight"), epsilon)
            q, k, v = (weights.linear(f"{name}.self_attn.{part}_proj", normed).split(lengths) for part in "qkv")
            mixed = [_self_attended(config, *each) for each in zip(q, k, v, angles, strict=True)]
            x = x + weights.linear(f"{name}.self_attn.o_proj", torch.cat(mixed))
            normed = rms_normed(x, weights(f"{name}.post_attention_layernorm.weight"), epsilon)
            gate, up = (weights.linear(f"{name}.mlp.{part}_proj", normed) for part in ("gate", "up"))
            x = x + weights.linear(f"{name}.mlp.down_proj", functional.silu(gate) * up)
        wanted = torch.cat([x[-prompt.last :] for x, prompt in zip(x.split(lengths), prompts, strict=True)])
        found = weights.vocabulary_logits(rms_normed(wanted, weights("model.norm.weight"), epsilon))
        return list(found.split([prompt.last for prompt in prompts]))

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


def _mrope_angles(config: dict[str, Any], positions: torch.Tensor) -> torch.Tensor:
    """[T, d / 2]: each section of the frequencies follows its own row of the positions."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 1e6)
    frequencies = _frequencies(config["hidden_size"] // config["num_attention_heads"], theta)
    parts = frequencies.split(list(rope.get("mrope_section", (16, 24, 24))))
    return torch.cat([positions[row % 3, :, None] * part for row, part in enumerate(parts)], dim=-1)


def _self_attended(
    config: dict[str, Any], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, angles: torch.Tensor
) -> torch.Tensor:
    width = config["hidden_size"] // config["num_attention_heads"]
    q, k, v = (x.view(len(x), -1, width) for x in (q, k, v))
    return attended(rotated(q, angles), rotated(k, angles), v, torch.ones(len(q), len(q)).tril().bool())


def _layer_normed(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return functional.layer_norm(x, x.shape[1:], weights(f"{name}.weight"), weights(f"{name}.bias"), _EPSILON)
