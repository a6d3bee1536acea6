"""compressed-tensors, as llm-compressor stores it: formats pack-quantized, int-, float- and naive-quantized, and FP4.

Packed: `weight_packed` int32 [outputs, inputs * bits / 32], integers made unsigned by adding half their range, lowest
bits first, the last word padded; `weight_shape` int64 [2]; `weight_zero_point` packed along outputs. Else `weight`
int8 or float8 [outputs, inputs]. `weight_scale` is [1], [outputs, 1], [outputs, groups], or one for each block;
`weight_g_idx` int32 [inputs] the group of each input. A value is scale * (q - zero). NVFP4 and MXFP4: `weight_packed`
uint8 (see `fp4`); MXFP8: `weight_scale` uint8 [outputs, inputs / 32], exponents of two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lookonce.models.checkpoint.headers import DTYPE_BYTES, TensorEntry, read_bytes
from lookonce.models.checkpoint.quantised import fp8
from lookonce.models.checkpoint.quantised.fp4 import fp4_matrix
from lookonce.models.checkpoint.quantised.matrix import WEIGHT, Matrix, Parts, require
from lookonce.models.checkpoint.quantised.scaled import Block, ScaledMatrix, block_of

if TYPE_CHECKING:
    import torch

_FORMATS = (
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision", "dense",
)  # fmt: skip
_BITS = {"int": range(1, 9), "float": (4, 8)}
_SCALES = ("F32", "BF16", "F16")
_MX = 32
"""Inputs of a group of the OCP's MX formats."""
_PACKED, _SCALE, _ZERO, _GROUP = "weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx"
_WHOLE = "weight_global_scale"
_UNUSED = frozenset(
    {"input_scale", "input_zero_point", "output_scale", "output_zero_point", "k_scale", "v_scale", "q_scale"}
    | {"input_global_scale"}
)
ENDINGS = frozenset({WEIGHT, _PACKED, _SCALE, _ZERO, _GROUP, _WHOLE, "weight_shape"}) | _UNUSED


@dataclass(frozen=True)
class PackedMatrix:
    """See `Matrix`."""

    shape: tuple[int, int]
    bits: int
    block: Block

    @property
    def label(self) -> str:
        return f"int{self.bits}"

    def rows(self, parts: Mapping[str, torch.Tensor], start: int, stop: int) -> torch.Tensor:
        import torch

        from lookonce.models.checkpoint.quantised.arithmetic import grid_rows, groups_of, unpacked

        inputs, half = self.shape[1], 1 << (self.bits - 1)
        values = unpacked(parts[_PACKED][start:stop], self.bits, 1)[:, :inputs].sub_(half).float()
        shape, columns = self.shape, None
        if (
            _GROUP in parts and int(parts[_GROUP].min()) >= 0
        ):  # -1: not filled in. One scale for each group, then each input's
            groups = math.ceil(inputs / self.block[1])
            columns = groups_of(parts[_GROUP], inputs, groups, self.block[1])
            shape = shape[0], groups
        block = self.block if columns is None else (self.block[0], 1)

        def spread(grid: torch.Tensor) -> torch.Tensor:
            rows = grid_rows(grid, start, stop, shape, block)
            return rows if columns is None or rows.shape[1] == 1 else rows.index_select(1, columns)

        if _ZERO in parts:
            zeros = parts[_ZERO]  # one number of all is not packed
            packed = zeros.dtype == torch.int32
            values -= spread(unpacked(zeros, self.bits, 0)[: -(-shape[0] // block[0])].sub(half) if packed else zeros)
        return values.mul_(spread(parts[_SCALE]))


class CompressedTensors:
    """See `Format`."""

    name = "compressed-tensors"
    unused = _UNUSED
    endings = ENDINGS

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """`groups` are the settings of weights in config_groups."""
        self._bits = sorted({int(group["num_bits"]) for group in groups})
        self._sizes = sorted({size for group in groups if (size := group.get("group_size")) and size > 0})
        self._blocks = [tuple(block) for group in groups if (block := group.get("block_structure"))]

    def matrix(self, parts: Parts) -> Matrix:
        if _PACKED in parts:
            fp4 = parts[_PACKED].dtype == "U8"
            return fp4_matrix(parts, _PACKED, _WHOLE, divides=True) if fp4 else self._packed(parts)
        weight = require(parts, WEIGHT, ("I8", *fp8.VALUES), 2)
        shape = weight.shape[0], weight.shape[1]
        scale = require(parts, _SCALE, (*_SCALES, "U8"))
        block = block_of(scale, shape, [(1, _MX)] if scale.dtype == "U8" else self._candidates())
        zero = None
        if _ZERO in parts:
            zero = _ZERO if math.prod(parts[_ZERO].shape) == math.prod(parts[_SCALE].shape) else None
            if zero is None:
                raise ValueError(f"has a {_ZERO} of shape {list(parts[_ZERO].shape)}, not as its {_SCALE}")
        return ScaledMatrix(shape, fp8.VALUES.get(weight.dtype, "int8"), block, _SCALE, zero)

    def _packed(self, parts: Parts) -> PackedMatrix:
        outputs, words = require(parts, _PACKED, ("I32",), 2).shape
        sides = _integers(require(parts, "weight_shape", ("I64", "I32"), 1))
        if len(sides) != 2 or sides[0] != outputs or sides[1] < 1:
            raise ValueError(f"of shape {[outputs, words]} has a weight_shape that says {sides}")
        shape = sides[0], sides[1]
        bits = next((bits for bits in self._bits if math.ceil(shape[1] * bits / 32) == words), None)
        if bits is None:
            raise ValueError(f"of shape {[outputs, words]} doesn't hold {shape[1]} integers of num_bits a row")
        block = block_of(require(parts, _SCALE, _SCALES), shape, self._candidates())
        if _ZERO in parts and block != shape:
            expected = math.ceil(math.ceil(outputs / block[0]) * bits / 32), math.ceil(shape[1] / block[1])
            if require(parts, _ZERO, ("I32",), 2).shape != expected:
                raise ValueError(f"has a {_ZERO} of shape {list(parts[_ZERO].shape)}, not {list(expected)}")
        if _GROUP in parts and require(parts, _GROUP, ("I32", "I64"), 1).shape != shape[1:]:
            raise ValueError(f"has a {_GROUP} of shape {list(parts[_GROUP].shape)}, not [{shape[1]}]")
        return PackedMatrix(shape, bits, block)

    def _candidates(self) -> Iterator[Block]:
        yield from ((1, size) for size in self._sizes)
        yield from ((block[0], block[1]) for block in self._blocks)


def format_of(settings: Mapping[str, Any]) -> CompressedTensors | None:
    """See `formats`."""
    groups = [group for group in (settings.get("config_groups") or {}).values() if isinstance(group, dict)]
    for stated in (settings.get("format"), *(group.get("format") for group in groups)):
        if stated is not None and stated not in _FORMATS:
            raise ValueError(f"format {stated!r} is not supported ({', '.join(_FORMATS)})")
    sparse = (settings.get("sparsity_config") or {}).get("format", "dense")
    if sparse != "dense":
        raise ValueError(f"sparsity_config: format {sparse!r} is not supported (dense)")
    if (settings.get("transform_config") or {}).get("config_groups"):
        raise ValueError("transform_config: rotations are not supported")
    weights = [group["weights"] for group in groups if isinstance(group.get("weights"), dict)]
    for weight in weights:
        kind, bits = weight.get("type", "int"), weight.get("num_bits", 8)
        if bits not in _BITS.get(kind, ()):
            raise ValueError(f"num_bits {bits!r} of type {kind!r} is not supported (int 1 to 8; float 4, 8)")
    if settings.get("format") == "dense":
        return None
    return CompressedTensors([{"num_bits": 8, **weight} for weight in weights])


def _integers(entry: TensorEntry) -> list[int]:
    raw, width = read_bytes(entry), DTYPE_BYTES[entry.dtype]
    return [int.from_bytes(raw[at : at + width], "little", signed=True) for at in range(0, len(raw), width)]
