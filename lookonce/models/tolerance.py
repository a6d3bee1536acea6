"""How far two computations of the same numbers may lie apart: one table, for the check at start and `lookonce verify`.

No torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

BOUNDS = {"float32": 2e-4, "float16": 0.05, "bfloat16": 0.25}
"""Greatest difference by compute dtype."""
INT8_BOUND = 0.5
"""The same where a half's matrices are int8, and what is expected is computed from the weights as they were before."""


def bound_of(dtype: str, quantization: str = "none") -> float:
    """The greatest difference that is rounding."""
    return BOUNDS[dtype] if quantization == "none" else INT8_BOUND


def difference(found: Sequence[float], expected: Sequence[float], scale: float | None = None) -> float:
    """The greatest, divided by `scale`; None: by the largest number expected, or by 1 where that is less.

    Infinite where there are more or fewer numbers, NaN where one is not a number."""
    if len(found) != len(expected):
        return math.inf
    ours, theirs = (np.asarray(numbers, dtype=np.float64) for numbers in (found, expected))
    whole = np.abs(theirs).max(initial=1.0) if scale is None else scale
    return float(np.abs(ours - theirs).max(initial=0.0) / whole)


def spread(logprobs: Sequence[float]) -> float:
    """What log-probabilities' differences are measured by: twice their standard deviation, or 1 if that is less."""
    return max(1.0, 2 * float(np.std(logprobs)))
