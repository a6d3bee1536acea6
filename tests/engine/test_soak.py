"""Long mixed load within small budgets: the memory bounds hold at every forward, and all is given back."""

from __future__ import annotations

import asyncio
import contextlib
import random

import pytest

from lm_service.engine.packed.engine import PackedEngine
from lm_service.engine.packed.options import PackedOptions
from lm_service.engine.types import ScoreItem, Scoring
from lookonce.core.errors import ErrorKind, LookonceError
from tests.engine.lab import TOKENS, Album, an_image, ask, drained, generation, prompt, words

SYSTEM = words(9, 1)
IMAGES = 12


class Audited:
    """A model that, at every forward, adds up the KV there is: nothing is allocated or freed meanwhile."""

    def __init__(self, adapter):
        self.shape, self.embed, self._adapter = adapter.shape, adapter.embed, adapter
        self.core = None
        self.forwards = 0
        self.most = 0

    def forward(self, *args):
        prefixes = sum(node.kv.nbytes for node in self.core.cache)
        assert prefixes == self.core.cache.bytes <= self.core.cache.budget
        assert self.core.pool.bytes <= self.core.options.kv_bytes
        assert len(self.core.scheduler.running) <= self.core.options.max_running
        self.forwards += 1
        self.most = max(self.most, prefixes)
        return self._adapter.forward(*args)


async def act(engine, chance: random.Random) -> None:
    """One client's doing: ask, ask for several answers, converse, score, leave early, or erase an image."""
    image = an_image(chance.randrange(IMAGES), 3 + chance.randrange(8), 9)
    text = words(60, chance.randrange(40))[: chance.randint(1, 60)]
    wanted = prompt(SYSTEM, image, text) if chance.random() < 0.8 else prompt(SYSTEM * 8, text)
    kind = chance.choice(["ask", "ask", "several", "talk", "score", "leave", "erase"])
    client = {"client": f"client-{chance.randrange(5)}", "logprobs": None}
    if kind == "erase":
        await engine.forget([], [image.image_digest])
    elif kind == "score":
        await engine.score(Scoring("s", tuple(ScoreItem(wanted, ((1,), (2, 3), (2, 4))) for _ in range(3))))
    elif kind == "leave":
        async with contextlib.aclosing(engine.generate(generation(wanted, 60, **client))) as stream:
            left = chance.randint(1, 6)
            async for _ in stream:
                left -= 1
                if not left:
                    break
    elif kind == "talk":
        parts = [SYSTEM, image, text]
        for turn in range(3):
            (answer,) = await ask(engine, generation(prompt(*parts), 12, **client))
            parts += [answer.tokens, words(8, turn)]
    else:
        tokens = chance.randint(1, 40)
        answers = await ask(engine, generation(wanted, tokens, n=3 if kind == "several" else 1, **client))
        assert [len(answer.tokens) for answer in answers] == [tokens] * len(answers)


@pytest.mark.parametrize("actions", [150, pytest.param(3000, marks=pytest.mark.slow)])
async def test_memory_stays_within_its_bounds_under_mixed_load(lab, actions):
    model, lab.album = Audited(lab.adapter), Album(lab.adapter.shape.hidden)
    token = lab.adapter.shape.token_bytes
    options = {"max_running": 9, "kv_bytes": 4 * 64 * token, "prefix_bytes": 450 * token, "slab_tokens": 64}
    engine = PackedEngine(model, TOKENS, frozenset(), PackedOptions(**options, long_suffix_tokens=40))
    model.core = engine._core
    await engine.start(lab.album)
    chance, gate = random.Random(actions), asyncio.Semaphore(30)

    async def one(seed: int) -> None:
        async with gate:
            try:
                await act(engine, random.Random(seed))
            except LookonceError as error:
                if error.kind is not ErrorKind.CONTEXT_LENGTH_EXCEEDED:  # alone, too large for the budgets
                    raise

    await asyncio.gather(*(one(chance.getrandbits(32)) for _ in range(actions)))
    growing = [generation(prompt(SYSTEM, words(36, 100 + number)), 100) for number in range(6)]  # outgrow slabs
    await asyncio.gather(*(ask(engine, each) for each in growing))
    await drained(engine)
    state = engine.describe()
    assert model.forwards > actions and model.most > 300 * token
    assert state.prefix_evictions > 0 and state.preemptions > 0
    await engine.forget([], [an_image(number).image_digest for number in range(IMAGES)])
    assert all(not node.images for node in engine._core.cache)
    await engine.close()
    assert (engine._core.pool.used_slots, engine._core.cache.bytes, len(engine._core.cache)) == (0, 0, 0)
