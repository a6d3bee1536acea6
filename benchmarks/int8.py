"""Int8 weights against plain ones at Qwen2-VL-2B's dimensions: one block of the tower, one layer of the language model.

Ratios of the matrices' own products within one run, rounds of both taking turns; and the error of each product.
`python -m benchmarks.int8`, and on a GPU, with `pip install 'lookonce[int8]'`:
`python -m benchmarks.int8 --device cuda:0 --dtype bfloat16`
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lookonce.models.devices import choose_device
from lookonce.models.linear import Int8Linear, gated_unit, linear
from lookonce.models.quantization import check_usable

TOWER = {"qkv": (1280, 3840), "proj": (1280, 1280), "fc1": (1280, 5120), "fc2": (5120, 1280)}
HIDDEN, KEYS, INNER = 1536, 256, 8960
ROUNDS = 7
Products = Callable[[torch.Tensor], torch.Tensor]


def best(*calls: Callable[[], object]) -> list[float]:
    """Least seconds of each call, taking turns."""
    least = [float("inf")] * len(calls)
    for _ in range(ROUNDS):
        for index, call in enumerate(calls):
            wait()
            started = time.perf_counter()
            call()
            wait()
            least[index] = min(least[index], time.perf_counter() - started)
    return least


def wait() -> None:
    """Until the GPU, if it is one, has done what it was told."""
    if torch.get_default_device().type == "cuda":
        torch.cuda.synchronize()


def tower_block(patches: int) -> dict[str, float]:
    """The four matrices of one vision block."""
    plain, small, inputs = [], [], []
    for width, height in TOWER.values():
        weight = torch.randn(height, width) / width**0.5
        plain.append(lambda x, w=weight: torch.nn.functional.linear(x, w))
        small.append(Int8Linear(weight))
        inputs.append(torch.randn(patches, width))
    return compare(plain, small, inputs)


def language_layer(tokens: int) -> dict[str, float]:
    """Query, key and value; output; the gated unit; down."""
    weights = {
        "qkv": torch.randn(HIDDEN + 2 * KEYS, HIDDEN) / HIDDEN**0.5,
        "output": torch.randn(HIDDEN, HIDDEN) / HIDDEN**0.5,
        "down": torch.randn(HIDDEN, INNER) / INNER**0.5,
    }
    gate, up = (torch.randn(INNER, HIDDEN) / HIDDEN**0.5 for _ in range(2))
    made = {
        way: [*(linear([w], quantization=way) for w in weights.values()), gated_unit(gate, up, quantization=way)]
        for way in ("none", "int8")
    }
    inputs = [torch.randn(tokens, width) for width in (HIDDEN, HIDDEN, INNER, HIDDEN)]
    return compare(made["none"], made["int8"], inputs)


def compare(plain: list[Products], small: list[Products], inputs: list[torch.Tensor]) -> dict[str, float]:
    """Seconds of all products in both ways, their ratio, and the largest relative error."""
    slow, fast = best(
        lambda: [call(x) for call, x in zip(plain, inputs, strict=True)],
        lambda: [call(x) for call, x in zip(small, inputs, strict=True)],
    )
    errors = [((b(x) - a(x)).norm() / a(x).norm()).item() for a, b, x in zip(plain, small, inputs, strict=True)]
    return {"plain_ms": slow * 1e3, "int8_ms": fast * 1e3, "speed_up": slow / fast, "error": max(errors)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.int8", description=__doc__)
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--device", default="cpu", help="cpu, cuda:0 ...")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    given = parser.parse_args()
    device = choose_device(given.device)
    check_usable("int8", [device])
    torch.set_default_device(device)
    torch.set_default_dtype(getattr(torch, given.dtype))
    torch.manual_seed(0)
    result: dict[str, dict[str, float]] = {}
    with torch.inference_mode():
        for patches in (256, 2048):
            result[f"tower block, {patches} patches"] = tower_block(patches)
        for tokens in (1, 8, 32, 512):
            result[f"language layer, {tokens} tokens"] = language_layer(tokens)
    for name, values in result.items():
        print(f"{name:<28}" + "  ".join(f"{key} {value:8.3f}" for key, value in values.items()))
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
