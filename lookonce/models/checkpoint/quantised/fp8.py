"""FP8 as DeepSeek and transformers (`weight_scale_inv`) and as AutoFP8 and FBGEMM (`weight_scale`) store it.

`weight` float8 [outputs, inputs] beside scales: one of all, [outputs] or [outputs, 1], or one for each block of
weight_block_size (128 x 128), the last ones cut off at the matrix's end. A value is scale * q, whatever the scales are
called. Scales of activations are not used: activations are not quantised.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lookonce.models.checkpoint.quantised.matrix import WEIGHT, Parts, require
from lookonce.models.checkpoint.quantised.scaled import Block, ScaledMatrix, block_of

_SCALES = ("weight_scale_inv", "weight_scale")
_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
UNUSED = frozenset({"input_scale", "activation_scale", "input_scale_ub", "k_scale", "v_scale", "q_scale"})
ENDINGS = frozenset({WEIGHT, *_SCALES}) | UNUSED
VALUES = {"F8_E4M3": "float8", "F8_E5M2": "float8"}


class Fp8:
    """See `Format`."""

    name = "FP8"
    unused = UNUSED
    endings = ENDINGS

    def __init__(self, block: Block) -> None:
        self._block = block

    def matrix(self, parts: Parts) -> ScaledMatrix:
        weight = require(parts, WEIGHT, tuple(VALUES), 2)
        name = next((name for name in _SCALES if name in parts), _SCALES[0])
        shape = weight.shape[0], weight.shape[1]
        return ScaledMatrix(
            shape, VALUES[weight.dtype], block_of(require(parts, name, _SCALE_DTYPES), shape, [self._block]), name
        )


def format_of(settings: Mapping[str, Any]) -> Fp8:
    """See `formats`."""
    block = settings.get("weight_block_size") or (128, 128)
    if len(block) != 2 or not all(isinstance(side, int) and side > 0 for side in block):
        raise ValueError(f"weight_block_size {block!r} is not two whole numbers above 0")
    return Fp8((block[0], block[1]))
