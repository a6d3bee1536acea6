"""Many questions over one image: the packed engine against the same forwards called bare, in one process, interleaved.

The floor is what transformers' own modules take for one prefix prefill, one prefill of all questions as one batch that
sees no image, and 16 batched decode steps that see none either; "that sees the image" adds what their attention over
it takes. --unsplit counts one encode on both sides, too, our encoder's and transformers' own, and adds the speed-up
over transformers' whole model asked N times, image and all; the ideal is that over its encode and the floor. --json
FILE keeps ratios.
Usage: python -m benchmarks.engine [--size 50m] [--model DIR] [--threads 2] [--rounds 3] [--questions 1 8 32 128]
       [--parts decode score wall] [--unsplit]
Targets: wall <= 1.15x floor; speed-up >= 0.9 of the ideal; decode step on an image <= 1.25x the step without; >= 3x
faster than unshared prefixes; score <= 1.1x one packed prefill; scheduling <= 10% of the step.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image

from benchmarks.bare import COLUMNS, QUESTION, ROWS, SYSTEM, TOKENS, Bare, Images, image, question
from lm_service.engine.answer import Answer, TokenTable
from lm_service.engine.packed.engine import PackedEngine
from lm_service.engine.packed.engine_core import EngineCore
from lm_service.engine.packed.options import PackedOptions
from lm_service.engine.packed.prefix_cache.content import prompt_contents
from lm_service.engine.packed.prefix_cache.pool import KV
from lm_service.engine.packed.scheduling.sequence import Request, Sequence
from lm_service.engine.sampling import SamplerState
from lm_service.engine.types import EmbeddingSource, Generation, Prompt, Sampling, ScoreItem, Scoring
from lookonce.core.identity import EmbeddingReference
from lookonce.core.process import keep_freed_memory
from lookonce.models.checkpoint import Checkpoint, open_checkpoint
from lookonce.models.omp_thread import run_in_omp_thread
from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from lookonce.models.qwen2_vl.text import Qwen2VLAdapter
from lookonce.models.qwen2_vl.vision import Encoder
from tests.modules import load_language_model, load_vision_tower

T = TypeVar("T")
MIB = 1 << 20
_TURN = 6  # decode steps in a row


class Timed:
    """An adapter that adds up the time of its forwards."""

    def __init__(self, adapter: Qwen2VLAdapter) -> None:
        self.adapter, self.shape, self.embed = adapter, adapter.shape, adapter.embed
        self.seconds = 0.0

    def forward(self, *args: Any) -> torch.Tensor:
        """As the adapter's, timed."""
        began = time.perf_counter()
        out = self.adapter.forward(*args)
        self.seconds += time.perf_counter() - began
        return out


def run_engine(engine: PackedEngine, prompts: list[Prompt]) -> Any:
    """All questions at once; every answer of full length."""

    async def one(prompt: Prompt) -> None:
        async for _ in engine.generate(Generation("q", prompt, Sampling(TOKENS, ignore_eos=True))):
            pass

    return asyncio.gather(*(one(prompt) for prompt in prompts))


def _beside(engine: PackedEngine, function: Callable[..., T], *args: Any) -> asyncio.Future[T]:
    """Call a function in the engine's thread: one that computed in another would slow both
    (see lookonce.models.omp_thread)."""
    done: Future[T] = Future()
    engine._tell(lambda: done.set_result(function(*args)))
    return asyncio.wrap_future(done)


def own_encoding(checkpoint: Checkpoint) -> Callable[[], float]:
    """A function that encodes an image as the vision service does, from its patches, and returns the seconds."""
    encoder = Encoder.load(checkpoint, torch.float32, torch.device("cpu"))
    pixels = 28 * COLUMNS * 28 * ROWS
    patches = encoder.prepare(Image.new("RGB", (28 * COLUMNS, 28 * ROWS)), pixels, pixels)

    def encoding() -> float:
        began = time.perf_counter()
        encoder.encode([patches])
        return time.perf_counter() - began

    encoding()
    return encoding


async def wall_times(
    adapter: Qwen2VLAdapter,
    bare: Bare,
    table: TokenTable,
    options: PackedOptions,
    counts: list[int],
    rounds: int,
    encoding: Callable[[], float] | None,
) -> dict[str, float]:
    """Ratio of the engine's wall time to the floor's, cold prefix, for each number of questions. `encoding` tells how
    many seconds our encoder takes for an image."""
    results = {}
    engine = PackedEngine(adapter, table, frozenset(), options)
    await engine.start(Images(adapter.shape.hidden))
    await run_engine(engine, [question(0, image(0))])  # a running engine knows how long its steps take
    own = encode = whole = 0.0
    if encoding is not None:
        own, encode, whole = [
            statistics.median([await _beside(engine, seconds) for _ in range(rounds)])
            for seconds in (encoding, bare.encode, bare.whole)
        ]
        print(f"  encode {own:.2f} s, transformers' {encode:.2f}, the unsplit model's answer {whole:.2f} s", flush=True)
    for count in counts:
        walls, floors, looks = [], [], []
        for round_ in range(rounds):
            shown = image(1 + 1000 * count + round_)
            prompts = [question(number, shown) for number in range(count)]
            began = time.perf_counter()
            await run_engine(engine, prompts)
            walls.append(time.perf_counter() - began)
            await engine.forget([shown.key], [])
            floors.append(await _beside(engine, bare.floor, count))
            looks.append(await _beside(engine, bare.looks, count))
        times = list(zip(walls, floors, looks, strict=True))
        results[f"wall/floor N={count}"] = statistics.median(wall / floor for wall, floor, _ in times)
        results[f"wall/floor that sees the image N={count}"] = statistics.median(
            wall / (floor + look) for wall, floor, look in times
        )
        if encoding is not None:
            ratios = [(own + wall) / (encode + floor) for wall, floor, _ in times]
            results[f"encode and wall / encode and floor N={count}"] = statistics.median(ratios)
            results[f"of the ideal speed-up N={count}"] = 1 / statistics.median(ratios)
            gain = statistics.median(count * whole / (own + wall) for wall in walls)
            results[f"speed-up over the unsplit model N={count}"] = gain
        print(f"  N={count:4}: wall, floor, looks (s)", *(f"{w:.3f} {f:.3f} {x:.3f};" for w, f, x in times), flush=True)
    await engine.close()
    return results


class Decoding:
    """An engine core in which `count` sequences decode; each call to `step` is one decode step of all."""

    def __init__(
        self,
        adapter: Any,
        table: TokenTable,
        options: PackedOptions,
        references: list[EmbeddingReference | None],
        donor: KV | None = None,
    ) -> None:
        """`donor` is the KV of an image's prefix, taken for every image's to spare the prefills."""
        self.model = Timed(adapter)
        prefills: list[Any] = []
        self.core = EngineCore(self.model, options, prefills.append)
        rows = Images(adapter.shape.hidden).rows
        for number, reference in enumerate(references):
            prompt = question(number, reference)
            request, sampling = Request(str(number), "", kept=False), Sampling(4000, ignore_eos=True)
            answer = Answer(0, sampling, table, frozenset(), 4000)
            state = SamplerState(sampling, prompt.token_ids)
            tokens = list(prompt.token_ids)
            request.sequences = [Sequence(request, 0, prompt, *prompt_contents([prompt]), tokens, answer, state)]
            self.core.enqueue(request)
        while not all(sequence.decoding for sequence in self.core.scheduler.running) or self.core.scheduler.queue:
            self.core.step()
            for fill in prefills:
                fill.rows = [(span, rows) for span in fill.node.images]
                if donor is not None:
                    fill.node.kv.copy_(donor)
                    fill.node.filled = fill.node.length - 1  # the last token is fed, to end the fill
                self.core.scheduler.loaded(fill, EmbeddingSource.TENSOR_CACHE, 0.0)
            prefills.clear()

    def step(self) -> float:
        """Seconds of one step."""
        began = time.perf_counter()
        self.core.step()
        self.core.events.clear()
        return time.perf_counter() - began


def unshared_bare(bare: Bare, count: int) -> Callable[[], float]:
    """A decode step of transformers where each of `count` sequences has the image's KV to itself."""
    cache = bare.prefill([question(0, image(0))], None)
    cache.batch_repeat_interleave(count)

    def step() -> float:
        began = time.perf_counter()
        bare.decode(cache, count, 100)
        elapsed = time.perf_counter() - began
        cache.crop(-1)
        return elapsed

    return step


def _prefix_kv(decoding: Decoding) -> KV:
    return next(node.kv for node in decoding.core.cache if node.images)


def decode_ratios(
    adapter: Qwen2VLAdapter, bare: Bare, table: TokenTable, options: PackedOptions, rounds: int
) -> dict[str, float]:
    """Decode steps of 32 sequences: on one image, on none, on an image each, and transformers' with unshared KV. Each
    takes a turn of several steps, of which the first does not count: it finds the caches full of another's KV (100 MB
    where that is unshared), while a step of a service follows one of its own."""
    count = 32
    shared = Decoding(adapter, table, options, [image(0)] * count)
    plain = Decoding(adapter, table, options, [None] * count)
    own = Decoding(adapter, table, options, [image(number) for number in range(count)], _prefix_kv(shared))
    unshared = unshared_bare(bare, count)
    times: dict[str, list[float]] = {"shared": [], "plain": [], "own": [], "transformers": []}
    forward, began = shared.model.seconds, shared.core.step_seconds
    for _ in range(3 * rounds):
        for name, step in (
            ("shared", shared.step),
            ("plain", plain.step),
            ("own", own.step),
            ("transformers", unshared),
        ):
            times[name] += [step() for _ in range(_TURN)][1:]
    overhead = 1 - (shared.model.seconds - forward) / (shared.core.step_seconds - began)
    median = {name: statistics.median(values) for name, values in times.items()}
    print("  decode step, ms:", {name: round(value * 1000, 1) for name, value in median.items()}, flush=True)
    return {
        "decode on one image / on none": median["shared"] / median["plain"],
        "decode on an image each / on one": median["own"] / median["shared"],
        "transformers unshared / decode on one image": median["transformers"] / median["shared"],
        "share of the step outside the forward": overhead,
    }


async def score_ratio(
    adapter: Qwen2VLAdapter, bare: Bare, table: TokenTable, options: PackedOptions, rounds: int
) -> dict[str, float]:
    """32 yes/no questions on a warm image against bare prefills of them: without it, and each with KV of it."""
    timed = Timed(adapter)
    engine = PackedEngine(timed, table, frozenset(), options)
    await engine.start(Images(adapter.shape.hidden))
    asked = [question(number, image(0)) for number in range(32)]
    items = tuple(ScoreItem(prompt, ((1,), (2,))) for prompt in asked)
    await engine.score(Scoring("s", items))
    cut = SYSTEM + ROWS * COLUMNS
    behind = [Prompt(prompt.token_ids[cut:], (), prompt.positions[:, cut:], prompt.next_position) for prompt in asked]
    plain = [question(number, None) for number in range(32)]
    first = Prompt(asked[0].token_ids[:cut], asked[0].images, asked[0].positions[:, :cut], 0)
    prefix = await _beside(engine, bare.prefill, [first], None)
    await _beside(engine, prefix.batch_repeat_interleave, 32)
    without: list[float] = []
    beside: list[float] = []
    shares: list[float] = []
    for _ in range(5 * rounds):
        forward, began = timed.seconds, time.perf_counter()
        await engine.score(Scoring("s", items))
        scored = time.perf_counter()
        shares.append((scored - began) / (timed.seconds - forward))
        await _beside(engine, bare.prefill, plain, None)
        unseen = time.perf_counter()
        await _beside(engine, bare.prefill, behind, prefix)
        seen = time.perf_counter()
        prefix.crop(-QUESTION)
        without.append((scored - began) / (unseen - scored))
        beside.append((scored - began) / (seen - unseen))
    await engine.close()
    return {
        "score of 32 / its packed forward": statistics.median(shares),
        "score of 32 / bare prefill on the image": statistics.median(beside),
        "score of 32 / bare prefill without image": statistics.median(without),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="50m")
    parser.add_argument("--model", type=Path, help="a checkpoint directory instead of a random one")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--questions", type=int, nargs="*", default=[1, 8, 32, 128])
    parser.add_argument("--parts", nargs="*", default=["decode", "score", "wall"])
    parser.add_argument("--unsplit", action="store_true", help="also ask transformers' whole model, image and all")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cpu", action="store_true", help="measure CPU time, with one thread: for busy machines")
    arguments = parser.parse_args()
    torch.set_num_threads(1 if arguments.cpu else arguments.threads)
    keep_freed_memory()  # as the service does
    if arguments.cpu:
        time.perf_counter = time.process_time
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.model or make_random_checkpoint(Path(folder) / "model", size=arguments.size)
        checkpoint = open_checkpoint(str(path))
        adapter = run_in_omp_thread(lambda: Qwen2VLAdapter(*load_language_model(checkpoint, torch.float32)))
        model, head = run_in_omp_thread(load_language_model, checkpoint, torch.float32)
        tower = run_in_omp_thread(load_vision_tower, checkpoint, torch.float32) if arguments.unsplit else None
        encoding = run_in_omp_thread(own_encoding, checkpoint) if arguments.unsplit else None
    bare = Bare(model, head, Images(adapter.shape.hidden).rows, tower)
    table = TokenTable([(number, b"a") for number in range(adapter.shape.vocabulary)])
    options = PackedOptions(kv_bytes=512 * MIB, prefix_bytes=2048 * MIB)
    results: dict[str, float] = {}
    if "decode" in arguments.parts:
        results |= run_in_omp_thread(decode_ratios, adapter, bare, table, options, arguments.rounds)
    if "score" in arguments.parts:
        results |= asyncio.run(score_ratio(adapter, bare, table, options, arguments.rounds))
    if "wall" in arguments.parts:
        walls = wall_times(adapter, bare, table, options, arguments.questions, arguments.rounds, encoding)
        results |= asyncio.run(walls)
    for name, value in results.items():
        print(f"  {name:45} {value:6.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
