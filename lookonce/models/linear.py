"""Matrix products of a model's weights, in whatever form the device computes them fastest.

On the CPU they are compiled products of our own (lookonce/models/kernels/panels.py), or oneDNN's
(lookonce/models/onednn.py), which need no pass of their own for SiLU, a gate or a residual. Elsewhere these are
`functional.linear` and plain arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

from lookonce.models.kernels.panels import PanelGatedUnit, PanelLinear, panels_serve
from lookonce.models.onednn import OneDnnLinear, blocked, onednn_pays, product, product_with
from lookonce.models.quantization import Int8Matrix

_FEW_ROWS = 256


class Linear(Protocol):
    """x [T, in] -> x W^T + b [T, out]."""

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


@dataclass(frozen=True)
class LayerWeights:
    """Those of a decoder layer."""

    input_norm: torch.Tensor  # [hidden]
    qkv: Linear  # hidden -> (heads + 2 kv_heads) * d
    output: Linear  # heads * d -> hidden
    mlp_norm: torch.Tensor  # [hidden]
    gate_up: GatedUnit  # hidden -> intermediate
    down: Linear  # intermediate -> hidden

    @property
    def matrices(self) -> tuple[Linear | GatedUnit, ...]:
        """In the order they are used in."""
        return self.qkv, self.output, self.gate_up, self.down


class PlainLinear:
    """A `Linear` over a weight as it is."""

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


class PlainGatedUnit:
    """A `GatedUnit` as one product with both matrices."""

    def __init__(self, gate: torch.Tensor, up: torch.Tensor) -> None:
        """Two matrices [out, in]."""
        self._both = PlainLinear(torch.cat([gate, up]))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `GatedUnit`."""
        gate, up = self._both(x).chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)


class BlockedGatedUnit:
    """A `GatedUnit` as two products: the first ends with SiLU, the second with the multiplication."""

    def __init__(self, gate: torch.Tensor, up: torch.Tensor) -> None:
        """Two matrices [out, in], copied."""
        self._gate, self._up = blocked(gate), blocked(up)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `GatedUnit`."""
        gate = product(x, self._gate, None, "swish")
        return product_with(x, gate, self._up, None, "mul")


class Int8Linear:
    """A `Linear` over int8 weights."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """`weight` [out, in] is copied, `bias` [out] is not."""
        self._matrix = Int8Matrix(weight, bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `Linear`."""
        return self._matrix(x)

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """See `Linear`."""
        return residual + self._matrix(x)


class Int8GatedUnit:
    """A `GatedUnit` over int8 weights."""

    def __init__(self, gate: torch.Tensor, up: torch.Tensor) -> None:
        """Two matrices [out, in], copied."""
        self._both = Int8Matrix(torch.cat([gate, up]))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `GatedUnit`."""
        gate, up = self._both(x).chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)


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
    if native and panels_serve(weight):
        return PanelLinear(weight, bias)
    return OneDnnLinear(weight, bias) if onednn_pays(weight) else PlainLinear(weight, bias)


def gated_unit(gate: torch.Tensor, up: torch.Tensor, *, quantization: str = "none", native: bool = True) -> GatedUnit:
    """The unit of these two matrices."""
    if quantization == "int8":
        return Int8GatedUnit(gate, up)
    if native and panels_serve(gate):
        return PanelGatedUnit(gate, up)
    return BlockedGatedUnit(gate, up) if onednn_pays(gate) else PlainGatedUnit(gate, up)
