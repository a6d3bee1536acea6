"""NVIDIA ModelOpt's FP8 and NVFP4, as its unified checkpoints store them.

FP8: `weight` float8 [outputs, inputs] and `weight_scale`, one number. NVFP4: `weight` uint8 [outputs, inputs / 2],
`weight_scale` float8 [outputs, inputs / 16], `weight_scale_2`, one number (see `fp4`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lookonce.models.checkpoint.quantised import fp8
from lookonce.models.checkpoint.quantised.fp4 import fp4_matrix
from lookonce.models.checkpoint.quantised.matrix import WEIGHT, Matrix, Parts

_ALGORITHMS = ("FP8", "NVFP4")
_WHOLE = "weight_scale_2"
ENDINGS = fp8.ENDINGS | {_WHOLE}


class ModelOpt:
    """See `Format`."""

    name = "ModelOpt"
    endings = ENDINGS
    unused = fp8.UNUSED

    def matrix(self, parts: Parts) -> Matrix:
        if WEIGHT in parts and parts[WEIGHT].dtype == "U8":
            return fp4_matrix(parts, WEIGHT, _WHOLE, divides=False)
        return fp8.format_of({}).matrix(parts)


def format_of(settings: Mapping[str, Any]) -> ModelOpt:
    """See `formats`."""
    algorithm = settings.get("quant_algo")
    if algorithm not in _ALGORITHMS:
        raise ValueError(f"quant_algo {algorithm!r} is not supported ({', '.join(_ALGORITHMS)})")
    return ModelOpt()
