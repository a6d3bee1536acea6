"""Int8 weights: one scale for each output row, symmetric; made from a half's own weights when it is loaded.

On the CPU the activations are quantised too, each row by its own largest value, and the product is torch's (FBGEMM or
oneDNN, in the CPU's int8 instructions). Elsewhere the weights are widened as they are used: half the memory, no more
speed. Imports torch: for the two model services only.

Why torch's own operators and not torchao: 0.18 works with torch 2.13 but has no prepacked product for the CPU; see
docs/LOG.md for both measured.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.nn import functional

ON_CPU, ELSEWHERE = "int8-rows", "int8-weights"
SCHEMES = (ON_CPU, ELSEWHERE)
"""What fingerprints call the two ways: their embeddings differ."""
_LEAST = torch.finfo(torch.float32).tiny
_RANGE = 127


def scheme(quantization: str, device: torch.device) -> str:
    """The name of a setting ("none", "int8") on a device, for fingerprints."""
    if quantization == "none":
        return "none"
    return ON_CPU if device.type == "cpu" else ELSEWHERE


class Int8Matrix:
    """x [..., in] -> x W^T + b [..., out], W held as int8."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """`weight` [out, in] is read once, `bias` [out] kept."""
        wide = weight.detach().float()
        scales = (wide.abs().amax(1) / _RANGE).clamp_(min=_LEAST)  # [out]
        self._bias = bias
        self._inputs, self._outputs = weight.shape[1], weight.shape[0]
        self._packed: Any = None
        if weight.device.type == "cpu":
            self._packed = _pack(wide, scales)
            self._edges = torch.zeros(1, self._inputs)
            self._edges[0, 0], self._edges[0, -1] = 1.0, -1.0
            # without VNNI, sums of products of 8-bit numbers may overflow 16 bits: seven are used
            self._reduced = not torch.cpu._is_vnni_supported()
        else:
            self._weight = (wide / scales[:, None]).round_().to(torch.int8)
            self._scales = scales.to(weight.dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The product, in the dtype of x."""
        if self._packed is None:
            product = functional.linear(x, self._weight.to(x.dtype)) * self._scales
        else:
            product = self._rows(x.reshape(-1, self._inputs)).to(x.dtype).view(*x.shape[:-1], self._outputs)
        return product if self._bias is None else product + self._bias

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in] -> [T, out] in float32. A row's result does not depend on its company: every row is brought to the
        range -1 to 1, and one more row holds both ends of it, so that the operator always finds the same range."""
        peaks = x.abs().amax(1, keepdim=True).float().clamp_(min=_LEAST)
        scaled = torch.cat([x.float() / peaks, self._edges])
        product: torch.Tensor = torch.ops.quantized.linear_dynamic(scaled, self._packed, self._reduced)
        return product[:-1].mul_(peaks)


class Int8Linear(nn.Module):
    """Stands in for a Linear."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._matrix = Int8Matrix(linear.weight, linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        return self._matrix(x)


def quantize(module: nn.Module) -> None:
    """Replace every Linear below a module, one at a time, so that no more than one exists in both forms."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Int8Linear(child))
        else:
            quantize(child)


def _pack(weight: torch.Tensor, scales: torch.Tensor) -> Any:
    zeros = torch.zeros(len(scales), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch means to move these tensors to torchao
        values = torch.quantize_per_channel(weight, scales.double(), zeros, 0, torch.qint8)
        return torch.ops.quantized.linear_prepack(values, None)
