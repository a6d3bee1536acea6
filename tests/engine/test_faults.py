"""What goes wrong for one does not go wrong for others: lost embeddings, bad numbers, failing steps, erasure."""

from __future__ import annotations

import asyncio
import math

import pytest
import structlog
import torch

from lm_service.engine.packed import engine as engine_module
from lm_service.engine.packed import engine_core as core
from lm_service.engine.packed.engine import PackedEngine
from lm_service.engine.packed.options import PackedOptions
from lm_service.engine.packed.scheduling.scheduler import Scheduler
from lm_service.engine.types import ScoreItem, Scoring
from lookonce.core.errors import ErrorKind, LookonceError
from tests.engine.lab import TOKENS, Album, an_image, ask, drained, generation, prompt, words

SYSTEM = words(9, 1)


async def test_a_lost_embedding_fails_only_those_who_need_it(lab):
    async with lab.engine() as engine:
        lab.album.lost.add(an_image(1).key)
        lab.album.gate = asyncio.Event()
        lost = [
            asyncio.create_task(ask(engine, generation(prompt(SYSTEM, an_image(1), words(4, i)), 3))) for i in range(5)
        ]
        lost.append(asyncio.create_task(engine.score(Scoring("s", (ScoreItem(prompt(an_image(1), [3]), ((1,),)),)))))
        other = asyncio.create_task(ask(engine, generation(prompt(SYSTEM, an_image(2), words(4, 9)), 3)))
        text = prompt(words(12, 10))
        (answer,) = await ask(engine, generation(text, 5))  # goes on while embeddings are loaded
        lab.check(text, answer)
        lab.album.gate.set()
        failures = await asyncio.gather(*lost, return_exceptions=True)
        assert all(isinstance(f, LookonceError) and f.kind is ErrorKind.EMBEDDING_MISSING for f in failures)
        (answer,) = await other
        lab.check(prompt(SYSTEM, an_image(2), words(4, 9)), answer)
        assert lab.album.loads[an_image(1).key] == 2  # two different prefixes, each asked for once

        lab.album.lost.clear()
        (answer,) = await ask(engine, generation(prompt(SYSTEM, an_image(1), words(4, 0)), 3))
        lab.check(prompt(SYSTEM, an_image(1), words(4, 0)), answer)


async def test_an_embedding_of_another_shape_is_refused(lab):
    async with lab.engine() as engine:
        lab.album.rows = lambda reference: torch.zeros(3, 5)
        with pytest.raises(LookonceError) as refused:
            await ask(engine, generation(prompt(an_image(1), words(4, 1)), 3))
        assert refused.value.kind is ErrorKind.EMBEDDING_INVALID


async def test_numbers_that_are_not_finite_spoil_nobody_else(lab):
    """NaN in one image: its questions fail, a neighbour's and a later sequence's in the same slots don't."""
    async with lab.engine() as engine:
        fine, rows = prompt(SYSTEM, an_image(2), words(6, 1)), lab.album.rows

        def poisoned(reference):
            return rows(reference) * float("nan") if reference.key == an_image(1).key else rows(reference)

        lab.album.rows = poisoned
        bad = [ask(engine, generation(prompt(SYSTEM, an_image(1), words(4, i)), 3)) for i in range(3)]
        *failures, (answer,) = await asyncio.gather(*bad, ask(engine, generation(fine, 8)), return_exceptions=True)
        assert all(isinstance(f, LookonceError) and f.kind is ErrorKind.INTERNAL for f in failures)
        lab.check(fine, answer)
        (answer,) = await ask(engine, generation(fine, 2))
        assert answer.finish.timings.prefix_hit, "what both have in common, and the neighbour's image, stay"
        lab.album.rows = rows
        for wanted in (prompt(SYSTEM, an_image(1), words(4, 0)), prompt(words(20, 3))):
            (answer,) = await ask(engine, generation(wanted, 9))
            lab.check(wanted, answer)


class Failing:
    """A model whose forward fails whenever a certain token is fed, or the first so many times."""

    def __init__(self, adapter, token, times=math.inf):
        self._adapter, self._token, self._times = adapter, token, times
        self.shape = adapter.shape

    def embed(self, token_ids):
        if self._times and (token_ids == self._token).any():
            self._times -= 1
            raise RuntimeError("secret detail")
        return self._adapter.embed(token_ids)

    def forward(self, *args):
        return self._adapter.forward(*args)


async def test_a_failing_step_fails_only_the_sequence_at_fault(lab, monkeypatch):
    # a logger of its own: another test of this process may have configured and used the module's
    monkeypatch.setattr(core, "_log", structlog.wrap_logger(structlog.PrintLogger()))
    engine = PackedEngine(
        Failing(lab.adapter, 511), TOKENS, frozenset(), PackedOptions(kv_bytes=1 << 20, prefix_bytes=1 << 20)
    )
    await engine.start(lab.album)
    good = [prompt(SYSTEM, an_image(1), words(5, i)) for i in range(4)]
    with structlog.testing.capture_logs() as logs:
        *answers, failure = await asyncio.gather(
            *(ask(engine, generation(wanted, 5)) for wanted in good),
            ask(engine, generation(prompt(SYSTEM, an_image(1), [3, 511, 4]), 5)),
            return_exceptions=True,
        )
    assert [entry["event"] for entry in logs] == ["step_failed", "sequence_failed"]
    assert isinstance(failure, LookonceError) and failure.kind is ErrorKind.INTERNAL
    assert "secret" not in failure.message
    for wanted, (answer,) in zip(good, answers, strict=True):
        lab.check(wanted, answer)
    await engine.close()


async def test_who_waits_with_the_same_words_about_another_image_is_not_failed(lab, monkeypatch):
    """What questions begin with alike cannot be computed for one request; another's, which waits, is about its own."""
    monkeypatch.setattr(core, "_log", structlog.wrap_logger(structlog.PrintLogger()))
    options = PackedOptions(kv_bytes=1 << 20, prefix_bytes=1 << 20, max_running=2, question_prefix_tokens=4)
    model = Failing(lab.adapter, 511, times=2)  # the step, and the shared prefix by itself
    engine = PackedEngine(model, TOKENS, frozenset(), options)
    await engine.start(lab.album)
    first, second = (
        tuple(ScoreItem(prompt(SYSTEM, an_image(number), [*words(8, 4), 511, *words(3, i)]), ((5,),)) for i in range(2))
        for number in (1, 2)
    )
    with structlog.testing.capture_logs() as logs:
        failure, scores = await asyncio.gather(
            engine.score(Scoring("f", first)), engine.score(Scoring("s", second)), return_exceptions=True
        )
    assert [entry["event"] for entry in logs] == ["step_failed", "sequence_failed"]
    assert isinstance(failure, LookonceError) and failure.kind is ErrorKind.INTERNAL
    lab.check_scores(second, scores)
    await engine.close()


def raising(times, place="before"):
    """What takes a function's place and raises so many times, `before` or `after` having done its work."""

    def wrap(function):
        left = [times]

        def faulty(*args, **kwargs):
            if left[0] and place == "before":
                left[0] -= 1
                raise RuntimeError("secret detail")
            result = function(*args, **kwargs)
            if left[0]:
                left[0] -= 1
                raise RuntimeError("secret detail")
            return result

        return faulty

    return wrap


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("what", ["schedule", "_admit", "computed"])
async def test_a_fault_beside_the_forward_ends_in_errors_and_the_engine_goes_on(lab, monkeypatch, what, place):
    monkeypatch.setattr(core, "_log", structlog.wrap_logger(structlog.PrintLogger()))
    monkeypatch.setattr(engine_module, "_log", structlog.wrap_logger(structlog.PrintLogger()))
    monkeypatch.setattr(Scheduler, what, raising(1, place)(getattr(Scheduler, what)))
    async with lab.engine(batch_invariant=True) as engine:
        asked = [ask(engine, generation(prompt(SYSTEM, an_image(1), words(4, i)), 3)) for i in range(4)]
        outcomes = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 60)
        failures = [outcome for outcome in outcomes if isinstance(outcome, LookonceError)]
        assert failures and all(failure.kind is ErrorKind.INTERNAL for failure in failures)
        assert not any("secret" in failure.message for failure in failures)
        assert not engine.failed
        wanted = prompt(SYSTEM, an_image(1), words(4, 9))
        (answer,) = await ask(engine, generation(wanted, 5))
        lab.check(wanted, answer)


@pytest.mark.parametrize("what", ["schedule", "fail"])
async def test_a_fault_that_stays_ends_the_engine_and_everybody_is_told(lab, monkeypatch, what):
    """`fail`: not even ending the requests works any more."""
    monkeypatch.setattr(engine_module, "_log", structlog.wrap_logger(structlog.PrintLogger()))
    monkeypatch.setattr(Scheduler, "schedule", raising(math.inf)(Scheduler.schedule))
    monkeypatch.setattr(Scheduler, what, raising(math.inf)(getattr(Scheduler, what)))
    engine = PackedEngine(lab.adapter, TOKENS, frozenset(), PackedOptions(kv_bytes=1 << 20, prefix_bytes=1 << 20))
    ended = asyncio.Event()
    await engine.start(Album(64), on_failure=ended.set)
    while not engine.failed:
        asked = [ask(engine, generation(prompt(words(5, i)), 5)) for i in range(3)]
        failures = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 60)
        assert {failure.kind for failure in failures} <= {ErrorKind.INTERNAL, ErrorKind.UNAVAILABLE}
    assert ended.is_set()
    with pytest.raises(LookonceError) as refused:
        await asyncio.wait_for(ask(engine, generation(prompt(words(5, 1)), 5)), 60)
    assert refused.value.kind is ErrorKind.UNAVAILABLE
    await asyncio.wait_for(engine.close(), 60)


async def test_forget(lab):
    """All KV of an image goes: at once when idle, with its last user when not."""
    first, second = an_image(1, 9, 11), an_image(2, 9, 11)
    async with lab.engine() as engine:
        for image in (first, second):
            await ask(engine, generation(prompt(image, words(40, 1)), 3))
        held = engine.describe().prefix_bytes
        assert await engine.forget([first.key], []) == 2  # the image's prefix and the answer kept behind it
        assert engine.describe().prefix_bytes == held // 2
        assert await engine.forget([first.key], []) == 0
        stream = engine.generate(generation(prompt(second, words(6, 2)), 240, logprobs=None))
        await anext(stream)
        assert await engine.forget([], [second.image_digest]) == 2
        assert engine.describe().prefix_bytes > 0
        async for _ in stream:
            pass
        await drained(engine)
        assert engine.describe().prefix_bytes == 0
        lab.album.lost.add(second.key)
        with pytest.raises(LookonceError):
            await ask(engine, generation(prompt(second, words(6, 2)), 3))


async def test_close_ends_everything(lab):
    engine = PackedEngine(lab.adapter, TOKENS, frozenset(), PackedOptions(kv_bytes=1 << 20, prefix_bytes=1 << 20))
    await engine.start(lab.album)
    asked = [asyncio.create_task(ask(engine, generation(prompt(words(5, i)), 5000, logprobs=None))) for i in range(5)]
    await asyncio.sleep(0.05)
    await engine.close()
    failures = await asyncio.gather(*asked, return_exceptions=True)
    assert all(isinstance(f, LookonceError) and f.kind is ErrorKind.UNAVAILABLE for f in failures)
    with pytest.raises(LookonceError):
        await ask(engine, generation(prompt(words(5, 1)), 5))


@pytest.mark.parametrize(
    ("wanted", "rest", "kind"),
    [
        (prompt([]), {}, ErrorKind.INVALID_ARGUMENT),
        (prompt([512]), {}, ErrorKind.INVALID_ARGUMENT),
        (prompt([1, 2], an_image(1)), {}, ErrorKind.INVALID_ARGUMENT),
        (prompt([1, 2]), {"n": 1000}, ErrorKind.INVALID_ARGUMENT),
        (prompt([1] * 300), {}, ErrorKind.CONTEXT_LENGTH_EXCEEDED),
    ],
)
async def test_refused(lab, wanted, rest, kind):
    async with lab.engine(context_tokens=200) as engine:
        with pytest.raises(LookonceError) as refused:
            await ask(engine, generation(wanted, 3, **rest))
        assert refused.value.kind is kind and refused.value.param
