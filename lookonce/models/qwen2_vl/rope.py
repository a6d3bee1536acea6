"""Rotary frequencies of the language half: plain ones, and those stretched for contexts longer than a model was trained
on, linearly or by YaRN (arXiv:2309.00071). Torch is imported when they are made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

TYPES = ("default", "mrope", "linear", "yarn")
STRETCHED = ("linear", "yarn")
THETA = 1_000_000.0
SECTIONS = (16, 24, 24)
_FAST, _SLOW = 32, 1


def rope_of(text: dict[str, Any]) -> dict[str, Any]:
    """The settings of positions; the older name counts first, as in transformers."""
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    return rope if isinstance(rope, dict) else {}


def rope_type(rope: dict[str, Any]) -> Any:
    """One of `TYPES`, or another that isn't computed."""
    return rope.get("rope_type") or rope.get("type") or "default"


def extended(text: dict[str, Any]) -> dict[str, Any]:
    """The settings with the context that YaRN stretches the trained one to: `factor` times as much."""
    rope, stated = rope_of(text), text.get("max_position_embeddings", 32768)
    factor, trained = rope.get("factor"), rope.get("original_max_position_embeddings") or stated
    if rope_type(rope) != "yarn" or not isinstance(factor, int | float) or not isinstance(trained, int):
        return text  # the settings' problems, if there are any, are told elsewhere
    rope = rope | {"original_max_position_embeddings": trained}
    return text | {"rope_scaling": rope, "max_position_embeddings": int(trained * factor)}


def rope_frequencies(width: int, theta: float) -> torch.Tensor:
    """Float32 [width / 2] on the CPU, whatever the default device: theta^(-2i / width) (RoFormer, arXiv:2104.09864)."""
    import torch

    steps = torch.arange(0, width, 2, dtype=torch.float, device="cpu") / width
    return 1.0 / theta**steps


def frequencies(text: dict[str, Any], width: int, default_theta: float = THETA) -> tuple[torch.Tensor, float]:
    """Float32 [width / 2] on the CPU, and what cosines and sines are multiplied by. The settings have no problems."""
    import torch

    rope = rope_of(text)
    theta = float(rope.get("rope_theta") or text.get("rope_theta") or default_theta)
    plain = rope_frequencies(width, theta)
    kind = rope_type(rope)
    if kind not in STRETCHED:
        return plain, 1.0
    if kind == "linear":
        return plain / float(rope["factor"]), 1.0
    trained = rope.get("original_max_position_embeddings") or text["max_position_embeddings"]
    factor = float(rope.get("factor") or text["max_position_embeddings"] / trained)
    turns = rope.get("beta_fast") or _FAST, rope.get("beta_slow") or _SLOW
    edges = [_frequency(count, width, theta, trained) for count in turns]
    if rope.get("truncate", True):
        edges = [math.floor(edges[0]), math.ceil(edges[1])]
    low, high = max(edges[0], 0), min(edges[1], width - 1)
    steps = torch.arange(width // 2, dtype=torch.float, device="cpu")
    stretched = ((steps - low) / (high - low or 0.001)).clamp(0, 1)  # 0: as trained, 1: stretched
    kept = 1 - stretched
    return plain / factor * (1 - kept) + plain * kept, _attention_factor(rope, factor)


def mrope_section(text: dict[str, Any], default: Sequence[int] = SECTIONS) -> list[int]:
    """How many frequencies follow time, height and width."""
    return list(rope_of(text).get("mrope_section", default))


def _frequency(count: float, width: int, theta: float, trained: int) -> float:
    """Number of the frequency that turns so many times over the trained context."""
    return width * math.log(trained / (count * 2 * math.pi)) / (2 * math.log(theta))


def _attention_factor(rope: dict[str, Any], factor: float) -> float:
    """As stated, or 0.1 ln(factor) + 1."""
    stated, scale, all_scale = (rope.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if stated is not None:
        return float(stated)

    def grown(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

    return grown(scale) / grown(all_scale) if scale and all_scale else grown(1.0)
