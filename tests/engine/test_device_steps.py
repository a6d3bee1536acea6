"""What a step asks of its device: operations, copies and waits, counted on a stand-in; and what becomes of an engine
whose device computes nothing any more."""

from __future__ import annotations

import asyncio

import pytest
import torch

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


async def counted(engine, images, questions, tokens):
    """Operations, copies to the device and waits of so many questions about each of so many images."""
    asked = [
        generation(prompt(SYSTEM, an_image(100 + i, 9, 9), words(5, 50 + 31 * i + q)), tokens, logprobs=None)
        for i in range(images)
        for q in range(questions)
    ]
    await asyncio.gather(*(ask(engine, one) for one in asked[::questions]))  # all images are there
    for counter in (standin.OPERATIONS, standin.COPIES, standin.WAITS):
        counter.clear()
    before = engine.describe().steps
    await asyncio.gather(*(ask(engine, one) for one in asked))
    found = sum(standin.OPERATIONS.values()), sum(standin.COPIES.values()), sum(standin.WAITS.values())
    return (*found, engine.describe().steps - before)


@pytest.mark.parametrize(
    ("images", "questions", "operations", "copies", "waits"),
    [(1, 32, 120, 6, 2), (32, 1, 700, 6, 2), (8, 4, 250, 8, 2)],
)
async def test_what_a_decode_step_asks_of_its_device(one_device, images, questions, operations, copies, waits):
    """No more than today: a step of 32 answers, about one image, 32, and eight. Copies are to and from the device."""
    async with one_device.engine(kv_bytes=32 << 20, prefix_bytes=32 << 20) as engine:
        short = await counted(engine, images, questions, 4)
        long = await counted(engine, images, questions, 12)
    steps = long[3] - short[3]
    assert 6 <= steps <= 9
    each = [(more - less) / steps for more, less in zip(long[:3], short[:3], strict=True)]
    assert each[0] <= operations and each[1] <= copies and each[2] <= waits, each


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
            for _ in range(5):
                with pytest.raises(LookonceError) as caught:
                    await ask(engine, generation(prompt(words(9, 3)), 3))
                assert caught.value.kind in (ErrorKind.INTERNAL, ErrorKind.UNAVAILABLE)
                if failed.is_set():
                    break
            async with asyncio.timeout(5):
                await failed.wait()
        assert caught.value.kind is ErrorKind.UNAVAILABLE or engine.failed


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
