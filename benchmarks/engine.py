"""Many questions over one image: the packed engine against the same forwards called bare, in one process, interleaved.

The floor is what transformers' own modules take for one prefix prefill, one prefill of all questions as one batch that
sees no image, and 16 batched decode steps that see none either; "that sees the image" adds what their attention over
it takes. --unsplit counts one encode on both sides, too, our encoder's and transformers' own, and adds the speed-up
over transformers' whole model asked N times, image and all; the ideal is that over its encode and the floor. --json
FILE keeps ratios. --apart runs the two sides in processes of their own, one after the other, so that one model is in
memory at a time: for models that two don't fit of.
Usage: python -m benchmarks.engine [--model qwen2-vl-50m] [--threads 2] [--rounds 3] [--questions 1 8 32 128]
       [--parts decode score wall] [--sequences 32] [--unsplit] [--apart] [--cpu] [--device cuda] [--dtype bfloat16]
Targets: wall <= 1.15x floor; speed-up >= 0.9 of the ideal; decode step on an image <= 1.25x the step without; >= 3x
faster than unshared prefixes; score <= 1.1x one packed prefill; scheduling <= 10% of the step.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.bare import TOKENS, image, question
from benchmarks.checkpoints import HELP, checkpoint_at
from benchmarks.engine_sides import Seconds, Sides, beside
from benchmarks.engine_steps import decode_ratios, decode_seconds, score_ratios, score_seconds
from lm_service.engine.packed.engine import PackedEngine
from lm_service.engine.packed.options import PackedOptions
from lm_service.engine.types import Generation, Prompt, Sampling
from lookonce.core.process import keep_freed_memory, return_freed_memory
from lookonce.models.checkpoint import open_checkpoint
from lookonce.models.omp_thread import run_in_omp_thread

MIB = 1 << 20


def run_engine(engine: PackedEngine, prompts: list[Prompt]) -> Any:
    """All questions at once; every answer of full length."""

    async def one(prompt: Prompt) -> None:
        async for _ in engine.generate(Generation("q", prompt, Sampling(TOKENS, ignore_eos=True))):
            pass

    return asyncio.gather(*(one(prompt) for prompt in prompts))


async def encode_seconds(sides: Sides, engine: PackedEngine | None) -> Seconds:
    """Of one image by our encoder, and by transformers'; and of an answer by the unsplit model."""
    found: Seconds = defaultdict(list)
    for _ in range(sides.rounds):
        if sides.encoding is not None:
            found["own encode"].append(await beside(engine, sides.encoding))
        if sides.bare is not None and sides.bare.tower is not None:
            found["encode"].append(await beside(engine, sides.bare.encode))
            if sides.bare.model is not None:
                found["whole"].append(await beside(engine, sides.bare.whole))
    return found


async def wall_seconds(sides: Sides, counts: list[int]) -> Seconds:
    """The engine's wall time, cold prefix, and the floor's, for each number of questions."""
    found: Seconds = defaultdict(list)
    engine, bare = None, sides.bare if sides.bare is not None and sides.bare.model is not None else None
    if sides.adapter is not None:
        engine = PackedEngine(sides.adapter, sides.table, frozenset(), sides.options)
        await engine.start(sides.images())
        await run_engine(engine, [question(0, image(0))])  # a running engine knows how long its steps take
    elif bare is not None:
        await beside(None, partial(bare.prefill, [question(0, None)], None))
    found |= await encode_seconds(sides, engine)
    for count in counts:
        for round_ in range(sides.rounds):
            if engine is not None:
                shown = image(1 + 1000 * count + round_)
                prompts = [question(number, shown) for number in range(count)]
                began = time.perf_counter()
                await run_engine(engine, prompts)
                found[f"wall {count}"].append(time.perf_counter() - began)
                await engine.forget([shown.key], [])
            if bare is not None:
                found[f"floor {count}"].append(await beside(engine, partial(bare.floor, count)))
                found[f"look {count}"].append(await beside(engine, partial(bare.looks, count)))
        print(
            f"  N={count}:", {name: values for name, values in found.items() if name.endswith(f" {count}")}, flush=True
        )
    if engine is not None:
        await engine.close()
    return found


def wall_ratios(seconds: Seconds, counts: list[int]) -> dict[str, float]:
    """The engine over the floor."""
    results = {}
    own, encode, whole = (statistics.median(seconds.get(name, [0.0])) for name in ("own encode", "encode", "whole"))
    if own and encode:
        results["own encode / transformers'"] = own / encode
    for count in counts:
        names = (f"wall {count}", f"floor {count}", f"look {count}")
        if any(name not in seconds for name in names):
            continue
        times = list(zip(*(seconds[name] for name in names), strict=True))
        results[f"wall/floor N={count}"] = statistics.median(wall / floor for wall, floor, _ in times)
        results[f"wall/floor that sees the image N={count}"] = statistics.median(
            wall / (floor + look) for wall, floor, look in times
        )
        if whole:
            ratio = statistics.median((own + wall) / (encode + floor) for wall, floor, _ in times)
            results[f"encode and wall / encode and floor N={count}"] = ratio
            results[f"of the ideal speed-up N={count}"] = 1 / ratio
            gain = statistics.median(count * whole / (own + wall) for wall, _, _ in times)
            results[f"speed-up over the unsplit model N={count}"] = gain
    return results


def measured(path: Path, given: argparse.Namespace) -> Seconds:
    """All that is asked for, of one side or both."""
    checkpoint = open_checkpoint(str(path))
    wall = "wall" in given.parts
    text = bool({*given.parts} - {"encode"})
    options = PackedOptions(kv_bytes=512 * MIB, prefix_bytes=given.prefix_mib * MIB)
    towers = "encode" in given.parts or (given.unsplit and wall)
    return_freed_memory()
    where = {"device": torch.device(given.device), "dtype": getattr(torch, given.dtype)}
    sides = Sides.load(checkpoint, given.side, options, given.rounds, towers=towers, text=text, **where)
    keep_freed_memory()  # as the services do before and when a model is loaded
    seconds: Seconds = {}
    if "decode" in given.parts:
        seconds |= run_in_omp_thread(decode_seconds, sides, given.sequences)
    if "score" in given.parts:
        seconds |= asyncio.run(score_seconds(sides, given.sequences))
    if wall or "encode" in given.parts:
        seconds |= asyncio.run(wall_seconds(sides, given.questions if wall else []))
    return seconds


def apart(path: Path, given: argparse.Namespace, folder: Path) -> Seconds:
    """The same, each side in a process of its own."""
    seconds: Seconds = {}
    for side in ("engine", "bare"):
        out = folder / f"{side}.json"
        options = [*_again(sys.argv[1:]), "--model", str(path), "--side", side, "--json", str(out)]
        subprocess.run([sys.executable, "-m", "benchmarks.engine", *options], check=True)
        seconds |= json.loads(out.read_text())
    return seconds


def _again(arguments: list[str]) -> list[str]:
    """Without what a side is told otherwise."""
    kept, skipped = [], False
    for argument in arguments:
        if skipped:
            skipped = False
        elif argument in ("--model", "--json"):
            skipped = True
        elif argument != "--apart":
            kept.append(argument)
    return kept


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2-vl-50m", help=HELP)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--questions", type=int, nargs="*", default=[1, 8, 32, 128])
    parser.add_argument("--sequences", type=int, default=32, help="of a decode step, and questions of a score")
    parser.add_argument("--prefix-mib", type=int, default=2048, help="KV of shared prefixes, for an image each")
    parser.add_argument("--parts", nargs="*", default=["decode", "score", "wall"], help="encode decode score wall")
    parser.add_argument("--unsplit", action="store_true", help="also ask transformers' whole model, image and all")
    parser.add_argument("--apart", action="store_true", help="each side in a process of its own")
    parser.add_argument("--side", choices=["both", "engine", "bare"], default="both", help="measure one; keeps seconds")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cpu", help="of both sides: cpu, cuda, cuda:1 ...")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--cpu", action="store_true", help="measure CPU time, with one thread: for busy machines")
    given = parser.parse_args()
    torch.set_num_threads(1 if given.cpu else given.threads)
    if given.cpu:
        time.perf_counter = time.process_time
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint_at(given.model, Path(folder))
        seconds = apart(path, given, Path(folder)) if given.apart else measured(path, given)
    if given.side != "both":
        for name, values in seconds.items():
            print(f"  {name:20}", *(f"{value:.3f}" for value in values), flush=True)
        given.json.write_text(json.dumps(seconds))
        return
    results: dict[str, float] = {}
    if "decode" in given.parts:
        results |= decode_ratios(seconds)
    if "score" in given.parts:
        results |= score_ratios(seconds)
    results |= wall_ratios(seconds, given.questions)
    for name, value in results.items():
        print(f"  {name:45} {value:6.3f}")
    if given.json:
        given.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
