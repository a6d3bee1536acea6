"""Matrix products of a model's weights, in whatever form the device computes them fastest.

On the CPU they are compiled products of our own (lookonce/models/kernels/panels.py), or oneDNN's, whose weights are
laid out once, as graphs frozen by torch.compile have them: MKL's sgemm repacks them every time, at a cost that few rows
never earn back. Both need no pass of their own for SiLU, a gate or a residual. Elsewhere these are `functional.linear`
and plain arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional

from lookonce.models.compiled import panel_gated_unit, panel_linear
from lookonce.models.quantization import int8_product

_FEW_ROWS = 256
_EXACT = 16  # rows up to which each number of them may occur


class Linear(Protocol):
    """x [T, in] -> x W^T + b [T, out]."""

    per_row_count: bool
    """Whether the device's library compiles it anew for each T."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The product."""
        ...

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The product and a residual [T, out]."""
        ...


class GatedUnit(Protocol):
    """x [T, in] -> SiLU(x G^T) * (x U^T) [T, out]: the first half of SwiGLU (arXiv:2002.05202)."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The product."""
        ...


class Mlp(Protocol):
    """What stands behind a decoder layer's attention."""

    @property
    def matrices(self) -> tuple[Linear | GatedUnit, ...]:
        """In the order they are used in."""
        ...

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Of x [T, hidden], and a residual [T, hidden]."""
        ...


@dataclass(frozen=True)
class GatedMlp:
    """SwiGLU: an `Mlp` of two steps."""

    gate_up: GatedUnit  # hidden -> intermediate
    down: Linear  # intermediate -> hidden

    @property
    def matrices(self) -> tuple[GatedUnit, Linear]:
        return self.gate_up, self.down

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.down.plus(self.gate_up(x), residual)


@dataclass(frozen=True)
class LayerWeights:
    """Those of a decoder layer."""

    input_norm: torch.Tensor  # [hidden]
    qkv: Linear  # hidden -> (heads + 2 kv_heads) * d
    output: Linear  # heads * d -> hidden
    mlp_norm: torch.Tensor  # [hidden]
    mlp: Mlp
    qk_norm: torch.Tensor | None = None  # [heads + kv_heads, d] of queries and keys, where they are normed

    @property
    def matrices(self) -> tuple[Linear | GatedUnit, ...]:
        """In the order they are used in."""
        return self.qkv, self.output, *self.mlp.matrices


@dataclass(frozen=True)
class VisionBlockWeights:
    """Those of a pre-norm block of a vision tower, with QuickGELU between the MLP's two matrices."""

    norm1: nn.LayerNorm
    qkv: Linear  # width -> 3 * width
    proj: Linear  # width -> width
    norm2: nn.LayerNorm
    fc1: Linear  # width -> inner
    fc2: Linear  # inner -> width
    inner: int

    @property
    def matrices(self) -> tuple[Linear, ...]:
        """In the order they are used in."""
        return self.qkv, self.proj, self.fc1, self.fc2


class PlainLinear:
    """A `Linear` over a weight as it is."""

    per_row_count = True

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """`weight` [out, in], `bias` [out]."""
        self._weight, self._bias = weight, bias
        self._float32_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `Linear`."""
        # for a few rows, MKL's float32 product is up to 3x as fast as W x^T
        if self._bias is None and self._float32_cpu and 1 < x.shape[0] <= _FEW_ROWS:
            return torch.mm(self._weight, x.t()).t()
        return functional.linear(x, self._weight, self._bias)

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """See `Linear`."""
        return residual + self(x)


class OneDnnLinear:
    """A `Linear` with the weight in oneDNN's layout."""

    per_row_count = True

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, pairs: bool = False) -> None:
        """`weight` [out, in] is copied, `bias` [out] is not. A lone row is a product of another kind, with other
        roundings; with `pairs` it is computed beside itself."""
        self._weight, self._bias, self._pairs = _onednn_layout(weight), bias, pairs

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `Linear`."""
        if self._pairs and x.shape[0] == 1:
            return _onednn(x.expand(2, -1), self._weight, self._bias, "none")[:1]
        return _onednn(x, self._weight, self._bias, "none")

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """See `Linear`."""
        return _onednn_with(x, residual, self._weight, self._bias, "add")


class Int8Linear:
    """A `Linear` over int8 weights; x may have more dimensions."""

    per_row_count = True

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """`weight` [out, in] is read once, `bias` [out] kept."""
        self._outputs, self._inputs = weight.shape
        self._bias, self._product = bias, int8_product(weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `Linear`: in the dtype of x."""
        product = self._product(x.reshape(-1, self._inputs)).view(*x.shape[:-1], self._outputs)
        return product if self._bias is None else product + self._bias

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """See `Linear`."""
        return residual + self(x)


class JoinedGatedUnit:
    """A `GatedUnit` as one product with both matrices."""

    def __init__(self, both: Linear) -> None:
        """Of G and, below it, U: in -> 2 * out."""
        self._both = both

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `GatedUnit`."""
        gate, up = self._both(x).chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)


class OneDnnGatedUnit:
    """A `GatedUnit` as two products: the first ends with SiLU, the second with the multiplication."""

    def __init__(self, gate: torch.Tensor, up: torch.Tensor) -> None:
        """Two matrices [out, in], copied."""
        self._gate, self._up = _onednn_layout(gate), _onednn_layout(up)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `GatedUnit`."""
        return _onednn_with(x, _onednn(x, self._gate, None, "swish"), self._up, None, "mul")


class LinearModule(nn.Module):
    """A `Linear` where torch wants a module."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in] -> [T, out]."""
        return self.linear(x)


def linear(
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor] = (),
    *,
    quantization: str = "none",
    native: bool = True,
) -> Linear:
    """One product with several matrices [out, in], one below the other; `quantization` is "none" or "int8". `native`:
    compiled by us where that serves."""
    weight = weights[0] if len(weights) == 1 else torch.cat(list(weights))
    bias = torch.cat(list(biases)) if biases else None
    if quantization == "int8":
        return Int8Linear(weight, bias)
    compiled = panel_linear(weight, bias) if native else None
    return compiled or (OneDnnLinear(weight, bias) if onednn_pays(weight) else PlainLinear(weight, bias))


def gated_unit(gate: torch.Tensor, up: torch.Tensor, *, quantization: str = "none", native: bool = True) -> GatedUnit:
    """The unit of these two matrices."""
    if quantization == "int8":
        return JoinedGatedUnit(Int8Linear(torch.cat([gate, up])))
    if native and (compiled := panel_gated_unit(gate, up)):
        return compiled
    return OneDnnGatedUnit(gate, up) if onednn_pays(gate) else JoinedGatedUnit(PlainLinear(torch.cat([gate, up])))


def replace_linears(module: nn.Module, make: Callable[[nn.Linear], Linear]) -> None:
    """Put what `make` makes in the place of every Linear below a module, one at a time, so that no more than one exists
    in both forms."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, LinearModule(make(child)))
        else:
            replace_linears(child, make)


def linear_of(module: nn.Module) -> Linear:
    """What `replace_linears` has put there. Raises TypeError where it has not been."""
    if not isinstance(module, LinearModule):
        raise TypeError(f"{type(module).__name__} is no LinearModule")
    return module.linear


def rounded_up(rows: int) -> int:
    """At most an eighth more rows, and one of few numbers: oneDNN compiles a product for each number of rows it meets,
    which takes 0.3 to 0.7 ms and keeps 0.5 MiB and more."""
    if rows <= _EXACT:
        return rows
    step = max(8, 1 << ((rows - 1).bit_length() - 4))
    return -(-rows // step) * step


def onednn_pays(like: torch.Tensor) -> bool:
    """Whether oneDNN computes products of such tensors (CPU; float32, or bfloat16 where the CPU has it)."""
    if like.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    has_bfloat16: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return like.dtype == torch.float32 or (like.dtype == torch.bfloat16 and has_bfloat16)


def _onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, then: str) -> torch.Tensor:
    """x W^T + b, W in oneDNN's layout, then "none" or a function such as "swish"."""
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, then, [], "")
    return out


def _onednn_with(
    x: torch.Tensor, other: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, then: str
) -> torch.Tensor:
    """x W^T + b, then "add" or "mul" with `other` [T, out]."""
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, bias, then)
    return out


def _onednn_layout(weight: torch.Tensor) -> torch.Tensor:
    """A copy of a matrix [out, in]."""
    laid_out: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    return laid_out
