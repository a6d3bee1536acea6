"""What dtype `auto` comes to: one rule for both services, and for the commands that foretell what these will do; and
what int8 is called.

Without torch. Why a CPU computes in float32, also one that multiplies bfloat16 itself: docs/LOG.md has the figures.
"""

from __future__ import annotations

FAST_BFLOAT16 = (8, 0)
"""Least compute capability of a CUDA GPU that multiplies bfloat16 itself."""
ON_CPU, ON_CUDA, ELSEWHERE = "int8-rows", "int8-bitsandbytes", "int8-weights"
SCHEMES = (ON_CPU, ON_CUDA, ELSEWHERE)
"""What fingerprints call the three ways to compute with int8 weights: their embeddings differ."""


def auto_dtype(device: str, stored: str, capability: tuple[int, int] | None = None) -> str:
    """bfloat16 on a GPU that is fast at it, unless the weights are stored in float32; or else float32.

    `device` is a type of torch's ("cpu", "cuda", "mps"); `capability` that of a CUDA GPU, None: 8.0 or more.
    """
    fast = device == "cuda" and (capability is None or capability >= FAST_BFLOAT16)
    return "bfloat16" if fast and stored != "float32" else "float32"
