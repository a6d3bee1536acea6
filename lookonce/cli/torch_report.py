"""`python -m lookonce.cli.torch_report`: what torch sees, as JSON. A process of its own, since importing torch is slow
and a broken CUDA installation can end the process that asks."""

from __future__ import annotations

import json
from typing import Any


def report() -> dict[str, Any]:
    """Version, threads, CUDA build, and every GPU with its memory in bytes."""
    import warnings

    warnings.simplefilter("ignore")
    import torch

    found: dict[str, Any] = {
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
    }
    found["available"] = torch.cuda.is_available()
    found["gpus"] = []
    for index in range(torch.cuda.device_count() if found["available"] else 0):
        free, total = torch.cuda.mem_get_info(index)
        capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
        name = torch.cuda.get_device_name(index)
        found["gpus"].append({"name": name, "capability": capability, "free": free, "total": total})
    return found


if __name__ == "__main__":
    print(json.dumps(report()))
