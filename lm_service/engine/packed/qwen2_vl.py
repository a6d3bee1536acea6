"""Qwen2-VL's text model as a packed adapter: transformers' weights, without its module overhead.

Projections that read the same input are fused to one matrix. The modules' parameters become views of the fused
matrices, so the weights still exist once and the modules still work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from lm_service.engine.packed.adapter import Attend, ModelShape

_FEW_ROWS = 96


@dataclass(frozen=True)
class _Layer:
    input_norm: torch.Tensor  # [hidden]
    qkv: torch.Tensor  # [(heads + 2 kv_heads) * d, hidden]
    qkv_bias: torch.Tensor | None
    output: torch.Tensor  # [hidden, heads * d]
    mlp_norm: torch.Tensor  # [hidden]
    gate_up: torch.Tensor  # [2 * intermediate, hidden]
    down: torch.Tensor  # [hidden, intermediate]


class Qwen2VLAdapter:
    """A `ModelAdapter` over transformers' Qwen2VLTextModel and an output head."""

    def __init__(self, model: Any, head: torch.nn.Linear) -> None:
        """`model` is a Qwen2VLTextModel, whose projections become views of fused matrices."""
        config = model.config
        self._model = model  # keeps the modules, and so the views, alive
        self._embedding: torch.Tensor = model.embed_tokens.weight.data
        self._head: torch.Tensor = head.weight.data
        self._head_bias: torch.Tensor | None = None if head.bias is None else head.bias.data
        self._norm: torch.Tensor = model.norm.weight.data
        self._float32_cpu = self._embedding.device.type == "cpu" and self._embedding.dtype == torch.float32
        self._epsilon = float(config.rms_norm_eps)
        if getattr(model, "has_sliding_layers", False):
            raise ValueError("sliding-window attention is not supported")
        self._layers = [_fuse_layer(layer) for layer in model.layers]
        rotary = model.rotary_emb
        self._frequencies: torch.Tensor = rotary.inv_freq.detach().float().to(self._embedding.device)  # [d / 2]
        self._rope_scale = float(rotary.attention_scaling)
        sections = list(rotary.mrope_section)
        rows = [row % 3 for row, width in enumerate(sections) for _ in range(width)]
        device = self._embedding.device
        self._section_row = torch.tensor(rows, device=device)  # [d / 2]: which position row each frequency follows
        self._shape = ModelShape(
            layers=len(self._layers),
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
            hidden=config.hidden_size,
            vocabulary=self._head.shape[0],
            context=config.max_position_embeddings,
            dtype=self._embedding.dtype,
            device=device,
        )

    @property
    def shape(self) -> ModelShape:
        """The model's dimensions."""
        return self._shape

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """int64 [T] -> [T, hidden]."""
        return functional.embedding(token_ids, self._embedding)

    def forward(
        self, hidden: torch.Tensor, positions: torch.Tensor, attend: Attend, rows: torch.Tensor
    ) -> torch.Tensor:
        """Logits [len(rows), vocabulary]. What follows the last layer's attention runs for those rows only."""
        cos, sin = self._rotary(positions)
        last = len(self._layers) - 1
        for index, layer in enumerate(self._layers):
            mixed = self._attention(index, layer, hidden, cos, sin, attend)
            if index == last:
                hidden, mixed = hidden.index_select(0, rows), mixed.index_select(0, rows)
            hidden = hidden + self._linear(mixed, layer.output)
            hidden = hidden + self._mlp(self._rms(hidden, layer.mlp_norm), layer)
        logits = self._linear(self._rms(hidden, self._norm), self._head)
        return logits if self._head_bias is None else logits + self._head_bias

    def _attention(
        self, index: int, layer: _Layer, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        shape = self._shape
        # row by row again, whichever way round it was computed: attention wants contiguous heads
        projected = self._linear(self._rms(hidden, layer.input_norm), layer.qkv).contiguous()
        if layer.qkv_bias is not None:
            projected.add_(layer.qkv_bias)
        heads = projected.view(-1, shape.heads + 2 * shape.kv_heads, shape.head_dim)
        rotated = _rotate(heads[:, : shape.heads + shape.kv_heads], cos, sin)
        values = heads[:, shape.heads + shape.kv_heads :]
        return attend(index, rotated[:, : shape.heads], rotated[:, shape.heads :], values)

    def _mlp(self, x: torch.Tensor, layer: _Layer) -> torch.Tensor:
        if self._upright(x):
            gate, up = torch.mm(layer.gate_up, x.t()).chunk(2, dim=0)
            return torch.mm(layer.down, functional.silu(gate).mul_(up)).t()
        gate, up = functional.linear(x, layer.gate_up).chunk(2, dim=-1)
        return functional.linear(functional.silu(gate).mul_(up), layer.down)

    def _linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.mm(weight, x.t()).t() if self._upright(x) else functional.linear(x, weight)

    def _upright(self, x: torch.Tensor) -> bool:
        """Whether to compute W x^T: for a few rows, MKL's float32 product is up to 1.5x as fast that way round."""
        return self._float32_cpu and 1 < x.shape[0] <= _FEW_ROWS

    def _rms(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float32:
            return functional.rms_norm(x, (x.shape[-1],), weight, self._epsilon)
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self._epsilon)
        return weight * wide.to(x.dtype)

    def _rotary(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [T, 1, d / 2] of M-RoPE: each frequency follows one of the three position rows."""
        angles = positions.index_select(0, self._section_row).t().float() * self._frequencies
        dtype = self._shape.dtype
        cos, sin = angles.cos().mul_(self._rope_scale), angles.sin().mul_(self._rope_scale)
        return cos.to(dtype).unsqueeze(1), sin.to(dtype).unsqueeze(1)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [T, heads, d], the two halves of d being the two coordinates."""
    first, second = x.chunk(2, dim=-1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    left, right = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=left).sub_(second * sin)
    torch.mul(second, cos, out=right).add_(first * sin)
    return out


def _fuse_layer(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
    return _Layer(
        input_norm=layer.input_layernorm.weight.data,
        qkv=_fuse(qkv, "weight"),
        qkv_bias=_fuse(qkv, "bias") if attention.q_proj.bias is not None else None,
        output=attention.o_proj.weight.data,
        mlp_norm=layer.post_attention_layernorm.weight.data,
        gate_up=_fuse([mlp.gate_proj, mlp.up_proj], "weight"),
        down=mlp.down_proj.weight.data,
    )


def _fuse(modules: list[Any], name: str) -> torch.Tensor:
    """The modules' parameters stacked along dim 0; each module keeps a view in place of its own copy."""
    fused = torch.cat([getattr(module, name).data for module in modules])
    start = 0
    for module in modules:
        rows = getattr(module, name).shape[0]
        setattr(module, name, torch.nn.Parameter(fused[start : start + rows], requires_grad=False))
        start += rows
    return fused
