"""What a step asks of its device: operations, copies and waits, counted on a stand-in; and what becomes of an engine
whose device computes nothing any more."""

from __future__ import annotations

import asyncio

import pytest
import torch

from lm_service.engine.packed.engine_core import EngineCore
from lm_service.engine.packed.execution.runner import Runner
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from tests import standin
from tests.engine.lab import an_image, ask, generation, prompt, words
from tests.engine.test_spread import SpreadLab

SYSTEM = words(9, 1)
LAYERS = 2


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    path = make_random_checkpoint(tmp_path_factory.mktemp("device") / "two", size="tiny", layers=LAYERS)
    return SpreadLab(path, (LAYERS,))


COUNTERS = (standin.OPERATIONS, standin.COPIES, standin.WAITS)


@pytest.mark.parametrize(
    ("images", "questions", "operations", "copies", "waits"),
    [(1, 32, 116, 5, 2), (32, 1, 620, 5, 2), (8, 4, 244, 7, 2)],
)
async def test_what_a_decode_step_asks_of_its_device(
    one_device, monkeypatch, images, questions, operations, copies, waits
):
    """No more than today: a step that does nothing but add a token to each of 32 answers, about one image, 32, and
    eight; the least of all such steps. Copies are to and from the device."""
    real, steps = EngineCore._compute, []

    def compute(self, batch):
        before = [sum(counter.values()) for counter in COUNTERS]
        whole = len(batch.suffixes) == 32 and all(chunk.sequence.decoding for chunk in batch.suffixes)
        real(self, batch)
        if whole and not batch.prefills:
            steps.append([sum(counter.values()) - less for counter, less in zip(COUNTERS, before, strict=True)])

    monkeypatch.setattr(EngineCore, "_compute", compute)
    asked = [
        generation(prompt(SYSTEM, an_image(100 + i, 9, 9), words(5, 50 + 31 * i + q)), 24, logprobs=None)
        for i in range(images)
        for q in range(questions)
    ]
    async with one_device.engine(kv_bytes=32 << 20, prefix_bytes=32 << 20) as engine:
        await asyncio.gather(*(ask(engine, one) for one in asked))
    assert steps, "no step had all answers in it"
    least = [min(one) for one in zip(*steps, strict=True)]
    assert least[0] <= operations and least[1] <= copies and least[2] <= waits, least


async def test_nothing_within_a_forward_waits_for_the_device(one_device, monkeypatch):
    """Prefills, shared prefixes, decoding and scores; what is planted is noticed."""
    real = Runner.run

    def run(self, batch):
        with standin.no_waits():
            return real(self, batch)

    monkeypatch.setattr(Runner, "run", run)
    wanted = [prompt(SYSTEM, an_image(1, 5, 6), words(8, seed)) for seed in range(3)]
    async with one_device.engine(step_tokens=24, burst_tokens=40) as engine:
        answers = await asyncio.gather(*(ask(engine, generation(one, 5)) for one in wanted))
        for one, (answer,) in zip(wanted, answers, strict=True):
            one_device.check(one, answer)
    with standin.no_waits(), pytest.raises(AssertionError, match="waits"):
        bool(torch.ones(1, device=standin.device(0)).sum() > 0)


async def test_a_broken_device_ends_the_engine(one_device):
    """Its error comes to light at the next wait, in what follows the forward, and stays: whoever waits is told, and the
    process is to end (lm_service.app.serve)."""
    failed = asyncio.Event()
    async with one_device.engine() as engine:
        engine._on_failure = failed.set
        (answer,) = await ask(engine, generation(prompt(words(9, 3)), 3))
        assert len(answer.tokens) == 3
        with standin.broken():
            with pytest.raises(LookonceError) as caught:
                await ask(engine, generation(prompt(words(9, 3)), 3))
            assert caught.value.kind in (ErrorKind.INTERNAL, ErrorKind.UNAVAILABLE)
            async with asyncio.timeout(5):
                await failed.wait()
        assert engine.failed


async def test_one_step_without_memory_fails_its_own_requests_only(one_device, monkeypatch):
    """Out of memory while a step is put together, or in the forward, is no reason to end."""
    real, left = Runner.run, [1]

    def run(self, batch):
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batch)

    monkeypatch.setattr(Runner, "run", run)
    wanted = prompt(words(9, 5))
    async with one_device.engine() as engine:
        (answer,) = await ask(engine, generation(wanted, 4))
        one_device.check(wanted, answer)
        assert not engine.failed
