"""Qwen2-VL's text model as a packed adapter: the modules' weights, without module overhead. Its successors' may norm
queries and keys, interleave the sections of M-RoPE, and have a deepstack.

Projections that read the same input are one product. The adapter takes the projections' weights out of the modules, so
that each exists once, in the form it is computed with. Layers may lie on several devices, one after the other: what
flows through them moves along.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch.nn import functional

from lookonce.models.compiled import text_layers, text_rows
from lookonce.models.linear import GatedMlp, LayerWeights, Linear, Mlp, PlainLinear, gated_unit, linear, rounded_up
from lookonce.models.qwen2_vl.modules import rms_norm
from lookonce.models.text_adapter import Attend, Deepstack, ModelShape, Stage

_SMALL_HEAD = 64 << 20  # bytes up to which a tied head is held a second time, to be computed faster


def gated_mlp(module: Any, device: torch.device, quantization: str, *, native: bool) -> Mlp:
    """A layer's MLP, of a module that loses its weights."""
    gate, up = (_taken(matrix).to(device) for matrix in (module.gate_proj, module.up_proj))
    unit = gated_unit(gate, up, quantization=quantization, native=native)
    return GatedMlp(unit, linear([_taken(module.down_proj).to(device)], quantization=quantization, native=native))


class Qwen2VLAdapter:
    """A `ModelAdapter` over transformers' Qwen2VLTextModel and an output head."""

    make_mlp: ClassVar[Callable[..., Mlp]] = staticmethod(gated_mlp)
    """(module, device, quantization, native=) -> what computes it; the module loses its weights."""

    def __init__(
        self,
        model: Any,
        head: torch.nn.Linear,
        *,
        quantization: str = "none",
        devices: Sequence[torch.device] | None = None,
        native: bool = True,
        deepstack: int = 0,
    ) -> None:
        """`model` is a Qwen2VLTextModel, whose projections lose their weights to the adapter. `quantization` ("none",
        "int8") is that of the layers' matrices; embedding and head stay as they are. Layers are brought to their
        `devices` one at a time, before they are quantised; None: they are there. `native`: use compiled kernels.
        `deepstack`: see `ModelShape`."""
        config = model.config
        self._embedding: torch.Tensor = model.embed_tokens.weight.data
        self._norm: torch.Tensor = model.norm.weight.data
        self._head_device = head.weight.device
        self._head: Callable[[torch.Tensor], torch.Tensor] = _head(
            head, self._embedding, tied=head.weight is model.embed_tokens.weight, native=native
        )
        self._epsilon = float(config.rms_norm_eps)
        if getattr(model, "has_sliding_layers", False):
            raise ValueError("sliding-window attention is not supported")
        devices = devices or [layer.input_layernorm.weight.device for layer in model.layers]
        self._borders = {
            index: devices[index] for index in range(1, len(devices)) if devices[index] != devices[index - 1]
        }
        self._layers = [
            _layer(*pair, quantization, self.make_mlp, native=native)
            for pair in zip(model.layers, devices, strict=True)
        ]
        rotary = model.rotary_emb
        self._frequencies: torch.Tensor = rotary.inv_freq.detach().float().to(self._embedding.device)  # [d / 2]
        self._rope_scale = float(rotary.attention_scaling)
        rows = _section_rows(rotary.mrope_section, interleaved=getattr(rotary, "interleaved", False))
        device = self._embedding.device
        self._section_row = torch.tensor(rows, device=device)  # [d / 2]: which position row each frequency follows
        self._shape = ModelShape(
            layers=len(self._layers),
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=2 * len(self._frequencies),
            hidden=config.hidden_size,
            vocabulary=self._embedding.shape[0],
            context=config.max_position_embeddings,
            dtype=self._embedding.dtype,
            stages=tuple(Stage(place, len(list(layers))) for place, layers in groupby(devices)),
            position_rows=3,
            deepstack=deepstack,
        )
        shape, rotated = self._shape, self._shape.heads + self._shape.kv_heads
        self._rows = None
        if native and len(shape.stages) == 1:
            self._rows = text_rows(shape.hidden, shape.head_dim, rotated, self._epsilon, self._embedding)
        self._compiled = text_layers(self._layers, self._norm, self._rows, shape)
        self._rounds = self._embedding.device.type == "cpu" and self._compiled is None

    @property
    def shape(self) -> ModelShape:
        """The model's dimensions."""
        return self._shape

    def drop_head(self) -> None:
        """From now on `forward` answers the rows that the head would be given: of an embedding model."""
        self._head, self._head_device = _as_they_are, self._norm.device

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """int64 [T] -> [T, hidden]."""
        return functional.embedding(token_ids, self._embedding)

    def forward(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        attend: Attend,
        rows: torch.Tensor,
        deepstack: Sequence[Deepstack] = (),
    ) -> torch.Tensor:
        """Logits [len(rows), vocabulary]; `hidden` may be overwritten. What follows the last layer's attention runs for
        those rows only. Where products are compiled for a number of rows, there are rows of zeros behind them, up to a
        round number."""
        cos, sin = self._rotary(positions)
        if self._compiled is not None and attend.calls is not None and not deepstack:
            return self._head(self._compiled(hidden, cos, sin, attend.calls, rows))
        tokens, wanted = hidden.shape[0], rows.shape[0]
        hidden, rows = self._padded(hidden), self._repeated(rows)
        last = len(self._layers) - 1
        for index, layer in enumerate(self._layers):
            if index in self._borders:
                hidden, cos, sin, rows = (x.to(self._borders[index]) for x in (hidden, cos, sin, rows))
            mixed = self._attention(index, layer, hidden, tokens, cos, sin, attend)
            if index == last:
                hidden, mixed = hidden.index_select(0, rows), mixed.index_select(0, rows)
            else:
                mixed = self._padded(mixed)
            hidden = layer.output.plus(mixed, hidden)
            hidden = layer.mlp.plus(self._rms(hidden, layer.mlp_norm), hidden)
            if index < min(last, self._shape.deepstack):  # behind the last layer are no image's rows
                for added in deepstack:
                    hidden[added.first : added.first + added.rows.shape[1]] += added.rows[index].to(hidden.device)
        return self._head(self._rms(hidden, self._norm).to(self._head_device))[:wanted]

    def _padded(self, x: torch.Tensor) -> torch.Tensor:
        """[T, n] and rows of zeros."""
        missing = rounded_up(x.shape[0]) - x.shape[0] if self._rounds else 0
        return functional.pad(x, (0, 0, 0, missing)) if missing else x

    def _repeated(self, rows: torch.Tensor) -> torch.Tensor:
        """Numbers of rows [n], the last one repeated."""
        missing = rounded_up(rows.shape[0]) - rows.shape[0] if self._rounds else 0
        return torch.cat([rows, rows[-1:].expand(missing)]) if missing else rows

    def _attention(
        self,
        index: int,
        layer: LayerWeights,
        hidden: torch.Tensor,
        tokens: int,
        cos: torch.Tensor,
        sin: torch.Tensor,
        attend: Attend,
    ) -> torch.Tensor:
        """Of the first `tokens` rows."""
        shape = self._shape
        projected = layer.qkv(self._rms(hidden, layer.input_norm))[:tokens]
        heads = projected.reshape(-1, shape.heads + 2 * shape.kv_heads, shape.head_dim)
        rotated, values = heads[:, : shape.heads + shape.kv_heads], heads[:, shape.heads + shape.kv_heads :]
        if layer.qk_norm is not None:
            rotated = rms_norm(rotated, layer.qk_norm, self._epsilon)
        if self._rows is not None:
            self._rows.rotate(rotated, cos, sin)
        else:
            rotated = _rotate(rotated, cos, sin)
        return attend(index, rotated[:, : shape.heads], rotated[:, shape.heads :], values)

    def _rms(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if self._rows is not None:
            return self._rows.norm(x, weight)
        return rms_norm(x, weight, self._epsilon)

    def _rotary(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [T, 1, d / 2] of M-RoPE: each frequency follows one of the three position rows."""
        rows = positions.index_select(0, self._section_row).t().contiguous()
        angles = rows.float() * self._frequencies
        dtype = self._shape.dtype
        cos, sin = angles.cos().mul_(self._rope_scale), angles.sin().mul_(self._rope_scale)
        return cos.to(dtype).unsqueeze(1), sin.to(dtype).unsqueeze(1)


def _section_rows(sections: Sequence[int], *, interleaved: bool) -> list[int]:
    """Which of the three position rows (time, height, width) each frequency follows. Interleaved, height and width have
    every third of as many as their sections say, from the second and the third on, and time all others."""
    if not interleaved:
        return [row % 3 for row, width in enumerate(sections) for _ in range(width)]
    return [at % 3 if at < 3 * sections[at % 3] else 0 for at in range(sum(sections))]


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [T, heads, d], the two halves of d being the two coordinates."""
    first, second = x.chunk(2, dim=-1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    left, right = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=left).sub_(second * sin)
    torch.mul(second, cos, out=right).add_(first * sin)
    return out


def _layer(
    layer: Any, device: torch.device, quantization: str, make_mlp: Callable[..., Mlp], *, native: bool
) -> LayerWeights:
    attention = layer.self_attn
    qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
    biases = [] if attention.q_proj.bias is None else [module.bias.data.to(device) for module in qkv]
    matrix = partial(linear, quantization=quantization, native=native)
    return LayerWeights(
        input_norm=layer.input_layernorm.weight.data.to(device),
        qkv=matrix([_taken(module).to(device) for module in qkv], biases),
        output=matrix([_taken(attention.o_proj).to(device)]),
        mlp_norm=layer.post_attention_layernorm.weight.data.to(device),
        mlp=make_mlp(layer.mlp, device, quantization, native=native),
        qk_norm=_qk_norm(attention, device),
    )


def _qk_norm(attention: Any, device: torch.device) -> torch.Tensor | None:
    """[heads + kv_heads, d]: the norm of queries for each of their heads, then that of keys."""
    if getattr(attention, "q_norm", None) is None:
        return None
    weights = [module.weight.data.to(device) for module in (attention.q_norm, attention.k_norm)]
    heads = (module.out_features // len(weights[0]) for module in (attention.q_proj, attention.k_proj))
    return torch.cat([weight.expand(count, -1) for weight, count in zip(weights, heads, strict=True)])


def _as_they_are(rows: torch.Tensor) -> torch.Tensor:
    return rows


def _head(head: torch.nn.Linear, embedding: torch.Tensor, *, tied: bool, native: bool) -> Linear:
    biases = [] if head.bias is None else [head.bias.data]
    if not tied:
        return linear([_taken(head)], biases, native=native)
    if embedding.nbytes <= _SMALL_HEAD:
        return linear([embedding], biases, native=native)
    return PlainLinear(embedding, *biases)  # the embedding needs its rows as they are


def _taken(module: Any) -> torch.Tensor:
    """A projection's weight, which the module has no longer."""
    weight: torch.Tensor = module.weight.data
    module.weight = None
    return weight
