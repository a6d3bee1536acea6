"""bitsandbytes as transformers stores it: NF4 and FP4 (QLoRA, arXiv:2305.14314), and int8 (arXiv:2208.07339).

4 bits: `weight` holds bytes of two values each, the upper bits first, of the matrix [outputs, inputs] in one row;
`weight.quant_map` float32 [16] the values, `weight.absmax` a scale for every `blocksize` of them. Nested, absmax is
uint8: an index to `weight.nested_quant_map` [256], times `weight.nested_absmax` of its block, plus an offset.
`weight.quant_state.bitsandbytes__nf4` is JSON with the rest, the dtype that values are rounded to among it.
8 bits: `weight` int8 [outputs, inputs] and `SCB` float32 [outputs]. A value is q * SCB / 127.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lookonce.models.checkpoint.headers import read_bytes
from lookonce.models.checkpoint.quantised.matrix import WEIGHT, Matrix, Parts, require

if TYPE_CHECKING:
    import torch

_STATES = tuple(f"{WEIGHT}.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
_ABSMAX, _MAP = f"{WEIGHT}.absmax", f"{WEIGHT}.quant_map"
_NESTED_ABSMAX, _NESTED_MAP = f"{WEIGHT}.nested_absmax", f"{WEIGHT}.nested_quant_map"
_MOST_JSON = 1 << 16
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class FourBitMatrix:
    """See `Matrix`."""

    shape: tuple[int, int]
    label: str
    block: int  # values that share a scale
    nested_block: int | None  # scales that share one
    offset: float
    dtype: str

    def rows(self, parts: Mapping[str, torch.Tensor], start: int, stop: int) -> torch.Tensor:
        import torch

        inputs = self.shape[1]
        first, last = start * inputs, stop * inputs
        packed = parts[WEIGHT].reshape(-1).view(torch.uint8)[first // 2 : -(-last // 2)]
        index = torch.stack([packed >> 4, packed & 15], 1).reshape(-1)[: last - first]
        begun = first // self.block
        scales = self._scales(parts, begun, -(-last // self.block))
        values = parts[_MAP].float()[index.int()]
        if first % self.block or last % self.block:
            values *= scales[torch.arange(first, last) // self.block - begun]
        else:
            values.view(-1, self.block).mul_(scales[:, None])
        return values.to(getattr(torch, self.dtype)).float().view(stop - start, inputs)

    def _scales(self, parts: Mapping[str, torch.Tensor], start: int, stop: int) -> torch.Tensor:
        import torch

        scales = parts[_ABSMAX][start:stop]
        if self.nested_block is None:
            return scales.float()
        block = torch.arange(start, stop) // self.nested_block
        return parts[_NESTED_MAP].float()[scales.int()].mul_(parts[_NESTED_ABSMAX].float()[block]).add_(self.offset)


@dataclass(frozen=True)
class Int8Matrix:
    """See `Matrix`."""

    shape: tuple[int, int]
    label = "int8"

    def rows(self, parts: Mapping[str, torch.Tensor], start: int, stop: int) -> torch.Tensor:
        return parts[WEIGHT][start:stop].float().mul_(parts["SCB"][start:stop].float()[:, None]).mul_(1 / 127)


class BitsAndBytes:
    """See `Format`."""

    name = "bitsandbytes"
    unused = frozenset[str]()
    endings = frozenset({WEIGHT, _ABSMAX, _MAP, _NESTED_ABSMAX, _NESTED_MAP, *_STATES, "SCB", "weight_format"})

    def matrix(self, parts: Parts) -> Matrix:
        if "SCB" in parts or "weight_format" in parts:
            return _int8(parts)
        state = next((parts[name] for name in _STATES if name in parts), None)
        if state is None or state.nbytes > _MOST_JSON:
            raise ValueError("has no quant_state beside it")
        return _four_bit(parts, json.loads(read_bytes(state)), state.stored_name.rpartition("__")[2])


def format_of(settings: Mapping[str, Any]) -> BitsAndBytes:
    """See `formats`: the tensors say all."""
    return BitsAndBytes()


def _int8(parts: Parts) -> Int8Matrix:
    weight, scales = require(parts, WEIGHT, ("I8",), 2), require(parts, "SCB", ("F32",), 1)
    if scales.shape != weight.shape[:1]:
        raise ValueError(f"of shape {list(weight.shape)} has an SCB of shape {list(scales.shape)}")
    if "weight_format" in parts and any(read_bytes(parts["weight_format"])):
        raise ValueError("has a weight_format other than 0 (row by row)")
    return Int8Matrix((weight.shape[0], weight.shape[1]))


def _four_bit(parts: Parts, state: Any, kind: str) -> FourBitMatrix:
    shape = state.get("shape") if isinstance(state, dict) else None
    sizes = [state.get("blocksize"), *(shape or ())] if isinstance(state, dict) else []
    if len(sizes) != 3 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"has a quant_state with shape {shape!r}")
    if state.get("dtype") not in _DTYPES:
        raise ValueError(f"has a quant_state with dtype {state.get('dtype')!r}")
    block, outputs, inputs = sizes
    blocks = math.ceil(outputs * inputs / block)
    if math.ceil(outputs * inputs / 2) != parts[WEIGHT].nbytes if WEIGHT in parts else True:
        raise ValueError(f"doesn't hold two values a byte of a matrix of shape {[outputs, inputs]}")
    nested = state.get("nested_blocksize") if _NESTED_ABSMAX in parts else None
    wanted = {_MAP: 16, _ABSMAX: blocks}
    if nested is not None:
        wanted |= {_NESTED_MAP: 256, _NESTED_ABSMAX: math.ceil(blocks / nested)}
    for ending, count in wanted.items():
        dtypes = ("U8",) if nested is not None and ending == _ABSMAX else ("F32", "BF16", "F16")
        found = math.prod(require(parts, ending, dtypes).shape)
        if found != count:
            raise ValueError(f"has {found} values of {ending}, not {count}")
    return FourBitMatrix((outputs, inputs), kind, block, nested, float(state.get("nested_offset", 0.0)), state["dtype"])
