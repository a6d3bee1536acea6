"""Decode steps and scores of benchmarks.engine, of one side or both in turn."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.bare import COLUMNS, QUESTION, ROWS, SYSTEM, Bare, Images, image, question
from benchmarks.engine_sides import Seconds, Sides, beside
from lm_service.engine.answer import Answer, TokenTable
from lm_service.engine.packed.engine import PackedEngine
from lm_service.engine.packed.engine_core import EngineCore
from lm_service.engine.packed.options import PackedOptions
from lm_service.engine.packed.prefix_cache.content import prompt_contents
from lm_service.engine.packed.prefix_cache.pool import KV
from lm_service.engine.packed.scheduling.sequence import Request
from lm_service.engine.packed.scheduling.sequence import Sequence as Running
from lm_service.engine.sampling import SamplerState
from lm_service.engine.types import EmbeddingSource, Prompt, Sampling, ScoreItem, Scoring
from lookonce.core.identity import EmbeddingReference
from lookonce.models.text_adapter import ModelAdapter

_TURN = 6  # decode steps in a row


class Timed:
    """An adapter that adds up the time of its forwards."""

    def __init__(self, adapter: ModelAdapter) -> None:
        self.adapter, self.shape, self.embed = adapter, adapter.shape, adapter.embed
        self.seconds = 0.0

    def forward(self, *args: Any) -> torch.Tensor:
        """As the adapter's, timed."""
        began = time.perf_counter()
        out = self.adapter.forward(*args)
        self.seconds += time.perf_counter() - began
        return out


class Decoding:
    """An engine core in which `count` sequences decode; each call to `step` is one decode step of all."""

    def __init__(
        self,
        adapter: Any,
        table: TokenTable,
        options: PackedOptions,
        references: Sequence[EmbeddingReference | None],
        donor: KV | None = None,
    ) -> None:
        """`donor` is the KV of an image's prefix, taken for every image's to spare the prefills."""
        self.model = Timed(adapter)
        prefills: list[Any] = []
        self.core = EngineCore(self.model, options, prefills.append)
        rows = Images(adapter.shape.hidden, adapter.shape.deepstack).rows
        for number, reference in enumerate(references):
            prompt = question(number, reference)
            request, sampling = Request(str(number), "", kept=False), Sampling(4000, ignore_eos=True)
            answer = Answer(0, sampling, table, frozenset(), 4000)
            state = SamplerState(sampling, prompt.token_ids)
            tokens = list(prompt.token_ids)
            request.sequences = [Running(request, 0, prompt, *prompt_contents([prompt]), tokens, answer, state)]
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


def decode_seconds(sides: Sides, count: int) -> Seconds:
    """Decode steps of `count` sequences: on one image, on none, on an image each, and transformers' with unshared KV.
    Each takes a turn of several steps, of which the first does not count: it finds the caches full of another's KV (100
    MB where that is unshared), while a step of a service follows one of its own."""
    found: Seconds = defaultdict(list)
    steps: dict[str, Callable[[], float]] = {}
    shared = None
    if sides.adapter is not None:
        of = (sides.adapter, sides.table, sides.options)
        shared = Decoding(*of, [image(0)] * count)
        own = Decoding(*of, [image(number) for number in range(count)], _prefix_kv(shared))
        steps |= {"shared": shared.step, "plain": Decoding(*of, [None] * count).step, "own": own.step}
    if sides.bare is not None:
        steps["transformers"] = unshared_bare(sides.bare, count)
    forward, began = (shared.model.seconds, shared.core.step_seconds) if shared else (0.0, 0.0)
    for _ in range(3 * sides.rounds):
        for name, step in steps.items():
            found[name] += [step() for _ in range(_TURN)][1:]
    if shared is not None:
        found["outside"] = [1 - (shared.model.seconds - forward) / (shared.core.step_seconds - began)]
    return found


def decode_ratios(seconds: Seconds) -> dict[str, float]:
    """Of what `decode_seconds` found."""
    median = {name: statistics.median(values) for name, values in seconds.items()}
    print("  decode step, ms:", {name: round(1000 * x, 1) for name, x in median.items() if name != "outside"})
    results = {
        "decode on one image / on none": median["shared"] / median["plain"],
        "decode on an image each / on one": median["own"] / median["shared"],
        "share of the step outside the forward": median["outside"],
    }
    if "transformers" in median:
        results["transformers unshared / decode on one image"] = median["transformers"] / median["shared"]
    return results


async def score_seconds(sides: Sides, count: int) -> Seconds:
    """Yes/no questions on a warm image, and bare prefills of them: without it, and each with KV of it."""
    found: Seconds = defaultdict(list)
    engine = None

    async def timed(name: str, function: Callable[[], object]) -> None:
        began = time.perf_counter()
        await beside(engine, function)
        found[name].append(time.perf_counter() - began)

    asked = [question(number, image(0)) for number in range(count)]
    items = tuple(ScoreItem(prompt, ((1,), (2,))) for prompt in asked)
    model = None
    if sides.adapter is not None:
        model = Timed(sides.adapter)
        engine = PackedEngine(model, sides.table, frozenset(), sides.options)
        await engine.start(sides.images())
        await engine.score(Scoring("s", items))
    if sides.bare is not None:
        cut = SYSTEM + ROWS * COLUMNS
        behind = [
            Prompt(prompt.token_ids[cut:], (), prompt.positions[:, cut:], prompt.next_position) for prompt in asked
        ]
        plain = [question(number, None) for number in range(count)]
        first = Prompt(asked[0].token_ids[:cut], asked[0].images, asked[0].positions[:, :cut], 0)
        prefix = await beside(engine, partial(sides.bare.prefill, [first], None))
        await beside(engine, partial(prefix.batch_repeat_interleave, count))
    for _ in range(5 * sides.rounds):
        if engine is not None and model is not None:
            forward, began = model.seconds, time.perf_counter()
            await engine.score(Scoring("s", items))
            found["score"].append(time.perf_counter() - began)
            found["packed"].append(model.seconds - forward)
        if sides.bare is not None:
            await timed("unseen", partial(sides.bare.prefill, plain, None))
            await timed("seen", partial(sides.bare.prefill, behind, prefix))
            prefix.crop(-QUESTION)
    if engine is not None:
        await engine.close()
    return found


def score_ratios(seconds: Seconds) -> dict[str, float]:
    """Of what `score_seconds` found."""

    def over(name: str) -> float:
        return statistics.median(one / other for one, other in zip(seconds["score"], seconds[name], strict=True))

    return {
        "score / its packed forward": over("packed"),
        "score / bare prefill on the image": over("seen"),
        "score / bare prefill without image": over("unseen"),
    }
