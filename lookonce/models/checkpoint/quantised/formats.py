"""The formats, by the `quant_method` of a config. Each is imported when it is asked for. No torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lookonce.core.errors import CheckpointError
from lookonce.models.checkpoint.quantised.matrix import WEIGHT, Format

STATED = "quantization_config"
OWN_FILE = "quantize_config.json"
"""Where GPTQ's tools put the same settings, beside a config.json that has none."""
_HERE = "lookonce.models.checkpoint.quantised"
METHODS = {
    "gptq": f"{_HERE}.gptq",
    "awq": f"{_HERE}.awq",
    "compressed-tensors": f"{_HERE}.compressed_tensors",
    "fp8": f"{_HERE}.fp8",
    "fbgemm_fp8": f"{_HERE}.fp8",
    "bitsandbytes": f"{_HERE}.bitsandbytes",
    "auto-round": f"{_HERE}.auto_round",
    "modelopt": f"{_HERE}.modelopt",
}
"""Each module has a function `format_of(settings)`: None for weights that are plain all the same, ValueError for
settings that it doesn't know; and ENDINGS, what the names of a matrix's tensors may end with."""


@cache
def part_endings() -> frozenset[str]:
    """What the names of quantised matrices' tensors end with, in any format, but for the plain weight's own."""
    found = (importlib.import_module(module).ENDINGS for module in METHODS.values())
    return frozenset[str]().union(*found) - {WEIGHT}


def format_of(path: Path, config: Mapping[str, Any], own_file: Mapping[str, Any] | None) -> Format | None:
    """The format that a checkpoint's settings state; None: its weights are plain.

    `config` is config.json, `own_file` quantize_config.json. Raises CheckpointError for a format that isn't read.
    """
    where, settings = _stated(path, config, own_file)
    if not settings:
        return None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{where} must be an object, got {settings!r}; take it from the model's repository")
    method = _method(settings)
    if method not in METHODS:
        raise CheckpointError(
            f"{where}: weights quantised by {method} are not supported ({', '.join(METHODS)}); "
            "use the original checkpoint, or one quantised by one of these"
        )
    build: Callable[[Mapping[str, Any]], Format | None] = importlib.import_module(METHODS[method]).format_of
    try:
        return build(settings)
    except ValueError as error:
        raise CheckpointError(f"{where}: {method}: {error}; use the original checkpoint, or one without it") from None


def _stated(path: Path, config: Mapping[str, Any], own_file: Mapping[str, Any] | None) -> tuple[str, Any]:
    """The settings, and where they stand. Some families' configs have them in the language model's part."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        if part.get(STATED):
            return f"{path / 'config.json'}: {STATED}", part[STATED]
    return str(path / OWN_FILE), {"quant_method": "gptq"} | dict(own_file) if own_file else None


def _method(settings: Mapping[str, Any]) -> str:
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        return "bitsandbytes"  # old saves don't say
    return str(method)
