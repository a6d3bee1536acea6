"""Qwen2.5-VL's tower as bare torch modules that hold weights under the published names."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from lookonce.models.qwen2_5_vl.config import vision_problems
from lookonce.models.qwen2_vl.modules import VISION_EPSILON, Tower, VisionAttention, load_vision_tower, refuse


class GatedMlp(nn.Module):
    """SwiGLU's three matrices, with biases."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner)
        self.up_proj = nn.Linear(width, inner)
        self.down_proj = nn.Linear(inner, width)


class WindowBlock(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width = config["hidden_size"]
        self.norm1 = nn.RMSNorm(width, eps=VISION_EPSILON)
        self.norm2 = nn.RMSNorm(width, eps=VISION_EPSILON)
        self.attn = VisionAttention(width, config["num_heads"])
        self.mlp = GatedMlp(width, config["intermediate_size"])


class WindowTower(Tower):
    """The vision half's weights."""

    def __init__(self, config: dict[str, Any]) -> None:
        refuse(vision_problems(config))
        width = config["hidden_size"]
        norm = nn.RMSNorm(width, eps=VISION_EPSILON)
        super().__init__(config, width, config["out_hidden_size"], lambda: WindowBlock(config), norm)
        self.full_blocks = frozenset(config["fullatt_block_indexes"])
        self.window_side: int = config["window_size"] // config["spatial_merge_size"] // config["patch_size"]


load_window_tower = partial(load_vision_tower, kind=WindowTower)
