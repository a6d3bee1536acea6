"""Where a half runs and in which dtype, when the settings say `auto`.

Imports torch: for the two model services only.
"""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch

from lookonce.core.dtypes import auto_dtype
from lookonce.core.errors import LookonceError, invalid

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str) -> torch.device:
    """The torch device of a setting; `auto` takes the first GPU, or else the CPU. Raises INVALID_ARGUMENT."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise _unknown(name) from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise invalid(f"device {name!r}: no usable CUDA GPU here; `lookonce doctor` tells why", param="device")
        if (device.index or 0) >= torch.cuda.device_count():
            raise invalid(f"device {name!r}: there are {torch.cuda.device_count()} GPUs here", param="device")
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise invalid(f"device {name!r}: no Metal GPU here", param="device")
    elif device.type != "cpu":
        raise _unknown(name)
    return device


def choose_dtype(name: str, devices: Sequence[torch.device], stored: str) -> torch.dtype:
    """The torch dtype of a setting for weights stored as `stored`; `auto` is what it comes to on all `devices`, or
    float32 where they differ (see `lookonce.core.dtypes`)."""
    if name != "auto":
        return _DTYPES[name]
    found = {auto_dtype(device.type, stored, _capability(device)) for device in devices}
    return _DTYPES[found.pop() if len(found) == 1 else "float32"]


def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device now."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    available: int = psutil.virtual_memory().available
    return available


def dtype_name(dtype: torch.dtype) -> str:
    """As settings and fingerprints write it: "float32", "bfloat16", "float16"."""
    return str(dtype).removeprefix("torch.")


def _unknown(name: str) -> LookonceError:
    return invalid(f"device {name!r} is not one of auto, cpu, cuda, cuda:N, mps", param="device")
