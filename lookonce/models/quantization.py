"""Int8 weights: one scale for each output row, symmetric; made from a half's own weights when it is loaded.

On the CPU and on CUDA the activations are quantised too, each row by its own largest value, and the product is one of
8-bit integers: torch's on the CPU (FBGEMM or oneDNN), bitsandbytes' on CUDA (cuBLASLt; LLM.int8(), arXiv:2208.07339,
without its outlier columns, which would make a row depend on its company). Elsewhere the weights are widened as they
are used: half the memory, no more speed. Imports torch: for the two model services only.

Why not torchao: 0.18 has no prepacked product for the CPU, and off the CPU it counts on torch.compile; see docs/LOG.md.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch.nn import functional

from lookonce.core.dtypes import ELSEWHERE, ON_CPU, ON_CUDA
from lookonce.core.errors import invalid

_LEAST = torch.finfo(torch.float32).tiny
_RANGE = 127


def scheme(quantization: str, device: torch.device) -> str:
    """The name of a setting ("none", "int8") on a device, for fingerprints."""
    if quantization == "none":
        return "none"
    return {"cpu": ON_CPU, "cuda": ON_CUDA}.get(device.type, ELSEWHERE)


def check_usable(quantization: str, devices: Iterable[torch.device]) -> None:
    """Raise INVALID_ARGUMENT, naming what to install, for a setting that these devices cannot serve here."""
    wanted = {scheme(quantization, device) for device in devices}
    if ON_CUDA in wanted and importlib.util.find_spec("bitsandbytes") is None:
        raise invalid(
            "quantization int8 on CUDA needs bitsandbytes: pip install 'lookonce[int8]'", param="quantization"
        )


class Product(Protocol):
    """x [T, in] -> x W^T [T, out], W held as int8."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The product, in the dtype of x."""
        ...


class CpuRows:
    """A `Product` of 8-bit rows and weights on the CPU."""

    def __init__(self, weight: torch.Tensor) -> None:
        wide, scales = _scaled(weight)
        self._packed = _pack(wide, scales)
        self._edges = torch.zeros(1, weight.shape[1], dtype=torch.float32)
        self._edges[0, 0], self._edges[0, -1] = 1.0, -1.0
        # without VNNI, sums of products of 8-bit numbers may overflow 16 bits: seven are used
        self._reduced = not torch.cpu._is_vnni_supported()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """A row's result does not depend on its company: every row is brought to the range -1 to 1, and one more row
        holds both ends of it, so that the operator always finds the same range."""
        peaks = _peaks(x)
        scaled = torch.cat([x.float() / peaks, self._edges])
        product: torch.Tensor = torch.ops.quantized.linear_dynamic(scaled, self._packed, self._reduced)
        return product[:-1].mul_(peaks).to(x.dtype)


class CudaRows:
    """A `Product` of 8-bit rows and weights by bitsandbytes; on a CPU it computes the same, slowly."""

    def __init__(self, weight: torch.Tensor) -> None:
        import bitsandbytes  # noqa: F401 - makes its operators known

        wide, scales = _scaled(weight)
        self._weight = (wide / scales[:, None]).round_().to(torch.int8)
        self._peaks = scales * _RANGE  # of each weight row, as the operator wants them

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The operator's result is float16, whatever is asked: rows are multiplied by their peaks after it, where large
        ones don't overflow."""
        peaks = _peaks(x)
        rows = (x.float() * (_RANGE / peaks)).round_().to(torch.int8)
        ones = torch.ones(len(x), device=x.device, dtype=torch.float32)
        product: torch.Tensor = torch.ops.bitsandbytes.int8_scaled_mm(rows, self._weight, ones, self._peaks)
        return (product.float() * peaks).to(x.dtype)


class WidenedWeights:
    """A `Product` on any device: only the weights are rounded."""

    def __init__(self, weight: torch.Tensor) -> None:
        wide, scales = _scaled(weight)
        self._weight = (wide / scales[:, None]).round_().to(torch.int8)
        self._scales = scales.to(weight.dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `Product`."""
        product: torch.Tensor = functional.linear(x, self._weight.to(x.dtype)) * self._scales
        return product


_PRODUCTS: dict[str, type[CpuRows] | type[CudaRows] | type[WidenedWeights]] = {
    ON_CPU: CpuRows,
    ON_CUDA: CudaRows,
    ELSEWHERE: WidenedWeights,
}


def int8_product(weight: torch.Tensor) -> Product:
    """That of a weight [out, in], where it lies."""
    return _PRODUCTS[scheme("int8", weight.device)](weight)


def _scaled(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [out, in] in float32, and what its rows [out] are to be divided by."""
    wide = weight.detach().float()
    return wide, (wide.abs().amax(1) / _RANGE).clamp_(min=_LEAST)


def _peaks(x: torch.Tensor) -> torch.Tensor:
    """The largest value of each row [T, 1], never zero."""
    return x.abs().amax(1, keepdim=True).float().clamp_(min=_LEAST)


def _pack(weight: torch.Tensor, scales: torch.Tensor) -> Any:
    zeros = torch.zeros(len(scales), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch means to move these tensors to torchao
        values = torch.quantize_per_channel(weight, scales.double(), zeros, 0, torch.qint8)
        return torch.ops.quantized.linear_prepack(values, None)
