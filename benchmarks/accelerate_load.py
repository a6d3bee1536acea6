"""Loading the language half of a checkpoint: ours, and `accelerate` (`pip install accelerate`) over the same modules.

`python -m benchmarks.accelerate_load DIRECTORY`, each way in a process of its own: seconds of loading, and of touching
every page of the weights (accelerate maps a file whose dtype is the wanted one); peak memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
from torch import nn

from lookonce.models.checkpoint import Half, open_checkpoint
from lookonce.models.qwen2_vl.modules import TextModel, load_language_model, text_settings

_PAGE = 1024  # elements, of four bytes at most


def ours(path: str, dtype: torch.dtype) -> nn.Module:
    """As the language service does."""
    return load_language_model(open_checkpoint(path, needs=Half.LANGUAGE), dtype)[0]


def accelerate(path: str, dtype: torch.dtype) -> nn.Module:
    """Empty modules of ours, filled by a device map."""
    from accelerate import infer_auto_device_map, init_empty_weights, load_checkpoint_in_model

    config = text_settings(open_checkpoint(path, needs=Half.LANGUAGE))
    with init_empty_weights():
        head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)
        halves = nn.ModuleDict({"model": TextModel(config), "lm_head": head})
    head.weight = halves["model"].embed_tokens.weight
    places = infer_auto_device_map(halves, max_memory={"cpu": "64GiB"}, no_split_module_classes=["TextLayer"])
    load_checkpoint_in_model(halves, path, device_map=places, dtype=dtype)
    if any(parameter.is_meta for parameter in halves["model"].parameters()):
        raise ValueError("some weights were not loaded")
    return halves["model"]


WAYS = {"ours": ours, "accelerate": accelerate}


def measure(way: str, path: str, dtype: torch.dtype) -> dict[str, float]:
    """In this process."""
    began = time.perf_counter()
    model = WAYS[way](path, dtype)
    loaded = time.perf_counter()
    for weight in model.parameters():
        weight.view(-1)[::_PAGE].sum().item()
    touched = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"load_s": loaded - began, "touch_s": touched - loaded, "peak_mb": peak / 1024}


def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--way", choices=WAYS, help="in this process")
    given = parser.parse_args()
    if given.way:
        print(json.dumps(measure(given.way, given.path, getattr(torch, given.dtype))))
        return
    for way in WAYS:
        command = [sys.executable, "-m", "benchmarks.accelerate_load", given.path, "--way", way, "--dtype", given.dtype]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        print(f"{way:<12}", json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
