"""What a checkpoint's generation_config.json says of sampling, taken as vLLM takes it: for what requests leave out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lookonce.core.errors import CheckpointError
from lookonce.models.checkpoint.files import read_json

FILE = "generation_config.json"
_BOUNDS = {  # lowest, highest, and whether the lowest itself is a value
    "temperature": (0.0, 2.0, True),
    "top_p": (0.0, 1.0, False),
    "min_p": (0.0, 1.0, True),
    "repetition_penalty": (0.0, 10.0, False),
}


@dataclass(frozen=True)
class SamplingDefaults:
    """What a request is given that leaves a parameter out; greedy, unless a checkpoint says otherwise."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @property
    def stated(self) -> dict[str, float]:
        """Those that differ from greedy decoding's, for descriptions."""
        return {name: value for name, value in vars(self).items() if value != getattr(GREEDY, name)}


GREEDY = SamplingDefaults()


def sampling_defaults(path: Path) -> SamplingDefaults:
    """Those of a checkpoint directory. `do_sample` false means greedy, and true without a temperature one of 1, as in
    transformers. Raises CheckpointError for a value that can't be sampled with."""
    file = path / FILE
    stated = read_json(file) if file.is_file() else {}
    found: dict[str, Any] = {name: _number(file, name, stated[name]) for name in _BOUNDS if _says(stated, name)}
    if _says(stated, "top_k"):
        found["top_k"] = _count(file, stated["top_k"])
    if stated.get("do_sample") is False:
        found = {name: value for name, value in found.items() if name == "repetition_penalty"}
    elif stated.get("do_sample"):
        found = {"temperature": 1.0} | found
    return SamplingDefaults(**found)


def _says(stated: dict[str, Any], name: str) -> bool:
    return stated.get(name) is not None


def _number(file: Path, name: str, value: Any) -> float:
    low, high, included = _BOUNDS[name]
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not usable or not low <= value <= high or (value == low and not included):
        bounds = f"from {low:g} to {high:g}" if included else f"above {low:g} and at most {high:g}"
        raise CheckpointError(f"{file}: {name} must be {bounds}, got {value!r}; correct it, or remove it from the file")
    return float(value)


def _count(file: Path, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < -1:
        raise CheckpointError(
            f"{file}: top_k must be a whole number (0 or -1: all), got {value!r}; correct or remove it"
        )
    return max(value, 0)
