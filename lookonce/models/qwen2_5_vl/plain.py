"""Qwen2.5-VL's tower in its plain form (arXiv:2502.13923); its text model is Qwen2-VL's."""

from __future__ import annotations

import torch
from torch.nn import functional

from lookonce.models.plain import Weights, rms_normed
from lookonce.models.qwen2_vl.plain import PlainQwen2VL

_EPSILON = 1e-6


class PlainQwen25VL(PlainQwen2VL):
    """A `Plain`."""

    width = "hidden_size"

    def block(
        self, weights: Weights, number: int, x: torch.Tensor, angles: torch.Tensor, place: torch.Tensor
    ) -> torch.Tensor:
        """RMSNorm, attention over the window or the image, SwiGLU."""
        name, seen = f"blocks.{number}", None
        if number not in self.vision["fullatt_block_indexes"]:
            merge = self.vision["spatial_merge_size"]
            window = place // (self.vision["window_size"] // merge // self.vision["patch_size"] * merge)
            seen = (window[:, None] == window[None]).all(-1)
        normed = rms_normed(x, weights(f"{name}.norm1.weight"), _EPSILON)
        x = x + self.attention(weights, f"{name}.attn", normed, angles, seen)
        normed = rms_normed(x, weights(f"{name}.norm2.weight"), _EPSILON)
        gate, up = (weights.linear(f"{name}.mlp.{part}_proj", normed) for part in ("gate", "up"))
        return x + weights.linear(f"{name}.mlp.down_proj", functional.silu(gate) * up)

    def merged(self, weights: Weights, x: torch.Tensor) -> torch.Tensor:
        """[patches, width] -> [tokens, hidden]."""
        return self.projected(weights, rms_normed(x, weights("merger.ln_q.weight"), _EPSILON))
