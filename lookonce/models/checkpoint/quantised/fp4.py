"""FP4 (E2M1) as compressed-tensors and ModelOpt store it: NVFP4, and MXFP4 of the OCP's MX formats.

Two values a byte, the lower bits first, [outputs, inputs / 2]; a scale for every 16 (NVFP4, float8) or 32 inputs
(MXFP4, uint8: an exponent of two). NVFP4 has one more scale of the whole matrix, by which those of groups are divided
(compressed-tensors) or multiplied (ModelOpt). A value is scale * q.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lookonce.models.checkpoint.quantised.matrix import Parts, require

if TYPE_CHECKING:
    import torch

_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SCALE = "weight_scale"
GROUP_SCALES = {"F8_E4M3": 16, "U8": 32, "F8_E8M0": 32}
"""Dtypes of groups' scales, and inputs of a group."""


@dataclass(frozen=True)
class Fp4Matrix:
    """See `Matrix`."""

    shape: tuple[int, int]
    packed: str  # ending of the bytes
    size: int  # inputs that share a scale
    whole: str | None = None  # ending of the scale of all
    divides: bool = False  # by it, instead of times it

    @property
    def label(self) -> str:
        return "nvfp4" if self.whole else "mxfp4"

    def rows(self, parts: Mapping[str, torch.Tensor], start: int, stop: int) -> torch.Tensor:
        import torch

        from lookonce.models.checkpoint.quantised.arithmetic import scale_values

        table = torch.tensor([*_VALUES, *(-value for value in _VALUES)])
        packed = parts[self.packed][start:stop]
        values = table[torch.stack([packed & 15, packed >> 4], 2).int()].view(stop - start, -1, self.size)
        scales = scale_values(parts[_SCALE][start:stop])
        if self.whole is not None:
            whole = parts[self.whole].float().reshape(())
            scales = scales / whole if self.divides else scales * whole
        return values.mul_(scales[:, :, None]).view(stop - start, self.shape[1])


def fp4_matrix(parts: Parts, packed: str, whole: str, *, divides: bool) -> Fp4Matrix:
    """Raises ValueError for tensors that make none."""
    outputs, width = require(parts, packed, ("U8",), 2).shape
    scale = require(parts, _SCALE, tuple(GROUP_SCALES), 2)
    size, inputs = GROUP_SCALES[scale.dtype], 2 * width
    if inputs % size or scale.shape != (outputs, inputs // size):
        raise ValueError(
            f"of shape {[outputs, inputs]} has scales of shape {list(scale.shape)}, not one for {size} inputs"
        )
    if scale.dtype != "F8_E4M3":
        return Fp4Matrix((outputs, inputs), packed, size)
    if math.prod(require(parts, whole, ("F32",)).shape) != 1:
        raise ValueError(f"has a {whole} of shape {list(parts[whole].shape)}, not of one number")
    return Fp4Matrix((outputs, inputs), packed, size, whole, divides)
