"""Where a half runs and in which dtype, when the settings say `auto`.

Imports torch: for the two model services only.
"""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch

from lookonce.errors import LookonceError, invalid

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
    """The torch dtype of a setting for weights stored as `stored`; `auto` takes bfloat16 where all `devices` are fast
    at it and the weights hold no more than that, or else float32."""
    if name != "auto":
        return _DTYPES[name]
    return torch.bfloat16 if stored != "float32" and all(map(fast_bfloat16, devices)) else torch.float32


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device now."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    available: int = psutil.virtual_memory().available
    return available


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 itself; a CPU that must emulate it is some four times slower than in
    float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    supported = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return any(check() for check in supported if check is not None)


def dtype_name(dtype: torch.dtype) -> str:
    """As settings and fingerprints write it: "float32", "bfloat16", "float16"."""
    return str(dtype).removeprefix("torch.")


def _unknown(name: str) -> LookonceError:
    return invalid(f"device {name!r} is not one of auto, cpu, cuda, cuda:N, mps", param="device")
