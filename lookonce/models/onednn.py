"""Matrix products on the CPU with weights laid out once for oneDNN's blocked product, as graphs frozen by torch.compile
have them. MKL's sgemm repacks them every time, at a cost that few rows never earn back. They serve where products of
our own (lookonce/models/kernels/panels.py) don't.

Imports torch: for the two model services only.
"""

from __future__ import annotations

import torch
from torch import nn

from lookonce.models.kernels.panels import PanelModule, panels_serve
from lookonce.models.quantization import Int8Linear

_EXACT = 16  # rows up to which each number of them may occur


def rounded_up(rows: int) -> int:
    """At most an eighth more rows, and one of few numbers: oneDNN compiles a product for each number of rows it meets,
    which takes 0.3 to 0.7 ms and keeps 0.5 MiB and more."""
    if rows <= _EXACT:
        return rows
    step = max(8, 1 << ((rows - 1).bit_length() - 4))
    return -(-rows // step) * step


class OneDnnLinear:
    """x [T, in] -> x W^T + b [T, out], W in oneDNN's layout."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """`weight` [out, in] is copied, `bias` [out] is not."""
        self._weight, self._bias = blocked(weight), bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The product."""
        return product(x, self._weight, self._bias, "none")

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The product and a residual [T, out]."""
        return product_with(x, residual, self._weight, self._bias, "add")


class OneDnnModule(nn.Module):
    """Stands in for a Linear."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._linear = OneDnnLinear(linear.weight, linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in] -> [T, out]."""
        if x.shape[0] == 1:  # alone it would be a product of another kind, with other roundings
            return self._linear(x.expand(2, -1))[:1]
        return self._linear(x)


def lay_out(module: nn.Module, *, native: bool = True) -> None:
    """Replace every Linear below a module for which it pays, one at a time, so that no more than one exists in both
    forms. `native`: by compiled products of our own where they serve."""
    for name, child in module.named_children():
        if not isinstance(child, nn.Linear):
            lay_out(child, native=native)
        elif native and panels_serve(child.weight):
            setattr(module, name, PanelModule(child))
        elif onednn_pays(child.weight):
            setattr(module, name, OneDnnModule(child))


def needs_round_rows(module: nn.Module) -> bool:
    """Whether products below a module are compiled for each number of rows."""
    return any(isinstance(child, OneDnnModule | Int8Linear | nn.Linear) for child in module.modules())


def onednn_pays(like: torch.Tensor) -> bool:
    """Whether oneDNN computes products of such tensors (CPU; float32, or bfloat16 where the CPU has it)."""
    if like.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    has_bfloat16: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return like.dtype == torch.float32 or (like.dtype == torch.bfloat16 and has_bfloat16)


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, then: str) -> torch.Tensor:
    """x W^T + b, W as `blocked` lays it out, then "none" or a function such as "swish"."""
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, then, [], "")
    return out


def product_with(
    x: torch.Tensor, other: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, then: str
) -> torch.Tensor:
    """x W^T + b, then "add" or "mul" with `other` [T, out]."""
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, bias, then)
    return out


def blocked(weight: torch.Tensor) -> torch.Tensor:
    """A copy of a matrix [out, in] in oneDNN's layout."""
    laid_out: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    return laid_out
