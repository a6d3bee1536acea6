"""Our compiled matrix products against oneDNN's blocked ones and torch's own: the matrices of one language layer.

Ratios within one run, the three taking turns, least of some rounds; oneDNN gets a round number of rows, as it does
where it serves.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional

from lookonce.models.linear import (
    GatedMlp,
    GatedUnit,
    JoinedGatedUnit,
    LayerWeights,
    PlainLinear,
    gated_unit,
    linear,
    rounded_up,
)

SIZES = {"bundled": (128, 128, 384), "50m": (512, 256, 2048), "2b": (1536, 512, 8960)}  # hidden, keys and values, inner
ROWS = (1, 6, 50, 199, 400, 800)
KINDS = ("ours", "oneDNN", "torch")
_ROUNDS = 7
_SECONDS = 0.02  # of a round, about


def layers(size: str) -> dict[str, LayerWeights]:
    """The same random weights three times."""
    hidden, keys, inner = SIZES[size]
    matrices = [torch.randn(*shape) for shape in ((hidden + keys, hidden), (hidden, hidden), *[(inner, hidden)] * 2)]
    matrices = [matrix / matrix.shape[1] ** 0.5 for matrix in (*matrices, torch.randn(hidden, inner))]
    qkv, output, gate, up, down = matrices
    bias, norm = torch.randn(len(qkv)), torch.ones(hidden)

    def layer(native: bool | None) -> LayerWeights:
        if native is None:
            unit: GatedUnit = JoinedGatedUnit(PlainLinear(torch.cat([gate, up])))
            mlp = GatedMlp(unit, PlainLinear(down))
            return LayerWeights(norm, PlainLinear(qkv, bias), PlainLinear(output), norm, mlp)
        first, second, last = (
            linear(matrices, biases, native=native)
            for matrices, biases in (([qkv], [bias]), ([output], []), ([down], []))
        )
        return LayerWeights(norm, first, second, norm, GatedMlp(gated_unit(gate, up, native=native), last))

    return dict(zip(KINDS, map(layer, (True, False, None)), strict=True))


def run(layer: LayerWeights, x: torch.Tensor) -> torch.Tensor:
    """All its products."""
    layer.qkv(x)
    hidden = layer.output.plus(x, x)
    return layer.mlp.plus(x, hidden)


def seconds(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Least of each, taking turns."""
    least, counts = dict.fromkeys(calls, float("inf")), dict.fromkeys(calls, 1)
    for number in range(_ROUNDS + 1):
        for kind, call in calls.items():
            started = time.perf_counter()
            for _ in range(counts[kind]):
                call()
            each = (time.perf_counter() - started) / counts[kind]
            if number:
                least[kind] = min(least[kind], each)
            else:
                call()
                counts[kind] = max(1, int(_SECONDS / each))
    return least


def compare(size: str) -> dict[str, dict[str, float]]:
    """For each number of rows: milliseconds of each kind, and errors."""
    made, found = layers(size), {}
    for rows in ROWS:
        x = torch.randn(rows, SIZES[size][0])
        padded = functional.pad(x, (0, 0, 0, rounded_up(rows) - rows))
        inputs = {"ours": x, "oneDNN": padded, "torch": x}
        calls = {kind: partial(run, made[kind], inputs[kind]) for kind in KINDS}
        figures = {kind: 1000 * value for kind, value in seconds(calls).items()}
        found[str(rows)] = figures
    return found


def table(size: str, results: dict[str, dict[str, float]]) -> str:
    """Its lines."""
    lines = [f"{size}: milliseconds of a layer's products", f"{'rows':>6}" + "".join(f"{kind:>10}" for kind in KINDS)]
    for rows, figures in results.items():
        times = "".join(f"{figures[kind]:>10.3f}" for kind in KINDS)
        lines.append(f"{rows:>6}{times}  oneDNN / ours {figures['oneDNN'] / figures['ours']:.2f}")
    return "\n".join(lines)


def main() -> int:
    """Print a table for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["bundled", "50m"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    results = {}
    with torch.inference_mode():
        for size in options.sizes:
            results[size] = compare(size)
            print(table(size, results[size]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
