"""The checkpoints that benchmarks run on: random ones of a family's true dimensions, by name, or a directory."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

HELP = "a checkpoint directory, or a family and one of its sizes, of which a random one is written: qwen3-vl-2b"


def checkpoint_at(model: str, folder: Path, dtype: str = "float32", shards: int = 1) -> Path:
    """The directory `model` names; one is written into `folder` for a name such as `qwen2-vl-50m`, `qwen2.5-vl-3b` or
    `qwen3-vl-2b`. Raises ValueError for a name of no family, CheckpointError for a size that it doesn't have."""
    if Path(model).is_dir():
        return Path(model)
    family, _, size = model.lower().rpartition("-")
    try:
        maker = import_module(f"lookonce.models.{re.sub('[.-]', '_', family)}.synthetic")
    except ModuleNotFoundError:
        raise ValueError(f"{model}: no such directory, and no family and size such as qwen3-vl-2b") from None
    path: Path = maker.make_random_checkpoint(folder / "model", size=size, dtype=dtype, shards=shards)
    return path
