"""Each half of Qwen3-VL as bare torch modules that hold weights under the published names."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lookonce.models.qwen2_vl.modules import (
    VISION_EPSILON,
    Rotary,
    TextModel,
    Tower,
    VisionAttention,
    load_vision_tower,
    refuse,
)
from lookonce.models.qwen3_vl.config import SECTION, routed_text_problems, text_problems, vision_problems


class TanhMlp(nn.Module):
    """Two layers with tanh's approximation of GELU between."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.inner = inner
        self.linear_fc1 = nn.Linear(width, inner)
        self.linear_fc2 = nn.Linear(inner, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[patches, width] -> [patches, width]."""
        output: torch.Tensor = self.linear_fc2(functional.gelu(self.linear_fc1(hidden), approximate="tanh"))
        return output


class DeepstackBlock(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width = config["hidden_size"]
        self.norm1 = nn.LayerNorm(width, eps=VISION_EPSILON)
        self.norm2 = nn.LayerNorm(width, eps=VISION_EPSILON)
        self.attn = VisionAttention(width, config["num_heads"])
        self.mlp = TanhMlp(width, config["intermediate_size"])


class Merger(nn.Module):
    """merge x merge patches to one token of the language model's width."""

    def __init__(self, config: dict[str, Any], *, normed_together: bool) -> None:
        """`normed_together`: a token's patches are normed as one row, not each by itself."""
        super().__init__()
        self.merged, self.hidden = config["hidden_size"] * config["spatial_merge_size"] ** 2, config["out_hidden_size"]
        self.normed = self.merged if normed_together else config["hidden_size"]
        self.norm = nn.LayerNorm(self.normed, eps=VISION_EPSILON)
        self.linear_fc1 = nn.Linear(self.merged, self.merged)
        self.linear_fc2 = nn.Linear(self.merged, self.hidden)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[patches, width] -> [tokens, hidden]."""
        merged = self.norm(hidden.view(-1, self.normed)).view(-1, self.merged)
        tokens: torch.Tensor = self.linear_fc2(functional.gelu(self.linear_fc1(merged)))
        return tokens


class DeepstackTower(Tower):
    """The vision half's weights."""

    def __init__(self, config: dict[str, Any]) -> None:
        refuse(vision_problems(config))
        width = config["hidden_size"]
        super().__init__(config, width, config["out_hidden_size"], lambda: DeepstackBlock(config), nn.Identity())
        self.patch_embed.proj.bias = nn.Parameter(torch.empty(width))
        places = config["num_position_embeddings"]
        self.pos_embed = nn.Embedding(places, width, _weight=torch.empty(places, width))  # as in `TextModel`
        self.merger = Merger(config, normed_together=False)
        self.deepstack_blocks: list[int] = config["deepstack_visual_indexes"]
        self.deepstack_merger_list = nn.ModuleList(Merger(config, normed_together=True) for _ in self.deepstack_blocks)


class NormedAttention(nn.Module):
    """Grouped-query attention's projections, and the norms of queries and keys, head by head."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, width = config["hidden_size"], config["head_dim"]
        queries, keys = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
        self.q_proj = nn.Linear(hidden, queries, bias=False)
        self.k_proj = nn.Linear(hidden, keys, bias=False)
        self.v_proj = nn.Linear(hidden, keys, bias=False)
        self.o_proj = nn.Linear(queries, hidden, bias=False)
        self.q_norm = nn.RMSNorm(width)
        self.k_norm = nn.RMSNorm(width)


class Experts(nn.Module):
    """Those of a layer, their matrices stacked."""

    def __init__(self, experts: int, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))


class RoutedTextMlp(nn.Module):
    """The router of a mixture of experts, and these."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, experts = config["hidden_size"], config["num_experts"]
        self.chosen: int = config["num_experts_per_tok"]
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.experts: Any = Experts(experts, hidden, config["moe_intermediate_size"])


class InterleavedRotary(Rotary):
    """The same, but for where each of the three positions turns a head."""

    interleaved = True
    default_section = SECTION
    default_theta = 500_000.0

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config, config["head_dim"])


class NormedTextModel(TextModel):
    """The language half's weights but for the output head."""

    rotary = InterleavedRotary
    attention = NormedAttention
    problems = staticmethod(text_problems)


class RoutedTextModel(NormedTextModel):
    """With a mixture of experts in every layer."""

    mlp = RoutedTextMlp
    problems = staticmethod(routed_text_problems)


load_deepstack_tower = partial(load_vision_tower, kind=DeepstackTower)
