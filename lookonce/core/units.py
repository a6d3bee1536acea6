"""Sizes ("2GiB"), durations ("7d") and lists ("a, b") as people write them, in settings and store URLs."""

from __future__ import annotations

import math
import re

from lookonce.core.errors import invalid

SIZE_UNITS = {
    "": 1,
    "b": 1,
    "kb": 1000,
    "mb": 1000**2,
    "gb": 1000**3,
    "tb": 1000**4,
    "kib": 1024,
    "mib": 1024**2,
    "gib": 1024**3,
    "tib": 1024**4,
}
DURATION_UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_QUANTITY = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([A-Za-z]{0,3})")


def parse_size(text: str | int, *, param: str = "size", least: int = 1) -> int:
    """Bytes (>= `least`) from "512MiB", "2GiB", "1.5 GB" or a plain number.

    Raises LookonceError(INVALID_ARGUMENT) naming `param`.
    """
    number, unit = _split(str(text), SIZE_UNITS, param, "a size such as 512MiB, 2GiB or a number of bytes")
    size = round(number * SIZE_UNITS[unit])
    if size < least:
        raise invalid(f"{param} must be at least {least} byte, got {text!r}", param=param)
    return size


def parse_duration(text: str | float, *, param: str = "duration") -> float:
    """Seconds (> 0) from "250ms", "30s", "10m", "12h", "7d" or a plain number of seconds.

    Raises LookonceError(INVALID_ARGUMENT) naming `param`.
    """
    number, unit = _split(str(text), DURATION_UNITS, param, "a duration such as 30s, 10m, 7d or a number of seconds")
    seconds = number * DURATION_UNITS[unit]
    if not 0 < seconds < math.inf:
        raise invalid(f"{param} must be longer than 0 seconds, got {text!r}", param=param)
    return seconds


def format_size(size: int) -> str:
    """`size` bytes for a log line or a message: "512 B", "1.5 GiB"."""
    amount = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def _split(text: str, units: dict[str, float] | dict[str, int], param: str, wanted: str) -> tuple[float, str]:
    match = _QUANTITY.fullmatch(text.strip())
    if match is None or match[2].lower() not in units:
        raise invalid(f"{param} must be {wanted}, got {text!r}", param=param)
    return float(match[1]), match[2].lower()


def split_list(text: str) -> tuple[str, ...]:
    """Items of a comma-separated list, blank ones dropped."""
    return tuple(item.strip() for item in text.split(",") if item.strip())
