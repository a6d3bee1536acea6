"""What holds from one step to the next: how long a step gets, who is told of admission, when a place is free again."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
import torch

from lm_service.engine.packed.engine import PackedEngine
from lm_service.engine.packed.engine_core import Admitted, EngineCore
from lm_service.engine.packed.options import PackedOptions
from lm_service.engine.packed.scheduling.batch import StepBudget
from lm_service.engine.packed.scheduling.sequence import Request
from lm_service.engine.types import EmbeddingSource, EngineState, ScoreItem, Scoring
from lookonce.core.errors import ErrorKind, LookonceError
from tests.engine import lab as laboratory
from tests.engine.lab import TOKENS, an_image, ask, drained, generation, prompt, words

SYSTEM = words(9, 1)


class Watched:
    """A model whose forwards are counted by their tokens, and may have to wait for permission or take their time."""

    def __init__(self, adapter, *, permits: int | None = None, token_seconds: float = 0.0):
        self.shape, self.embed, self._adapter = adapter.shape, adapter.embed, adapter
        self._permits = None if permits is None else threading.Semaphore(permits)
        self._token_seconds = token_seconds
        self.sizes: list[int] = []

    def permit(self):
        self._permits.release()

    def forward(self, hidden, *rest):
        self.sizes.append(len(hidden))
        if self._permits is not None:
            self._permits.acquire()
        time.sleep(self._token_seconds * len(hidden))
        return self._adapter.forward(hidden, *rest)


def engine_of(lab, model, **options):
    lab.album = laboratory.Album(model.shape.hidden)
    options = {"kv_bytes": 4 << 20, "prefix_bytes": 4 << 20, "slab_tokens": 256, "batch_invariant": True, **options}
    return PackedEngine(model, TOKENS, frozenset(), PackedOptions(**options))


async def test_who_leaves_in_the_middle_of_a_step_is_in_no_other(lab):
    model = Watched(lab.adapter, permits=3)
    engine = engine_of(lab, model)
    await engine.start(lab.album)
    stream = engine.generate(generation(prompt(words(5, 1)), 200, logprobs=None))
    seen = 0
    while seen < 3:  # tokens that are there at the same time come together
        seen += len((await anext(stream)).token_ids)
    while len(model.sizes) < 4:  # noqa: ASYNC110 - the engine's thread is on its way into the fourth forward
        await asyncio.sleep(0.001)
    await stream.aclose()
    model.permit()
    await drained(engine)
    assert len(model.sizes) == 4 and engine.describe().kv_slots == 0
    model.permit()  # were there a fifth, it could run
    await engine.close()
    assert len(model.sizes) == 4


@pytest.mark.parametrize("native", [True, False])
async def test_a_question_begins_in_the_step_that_completes_its_image(lab, native):
    model = Watched(lab.adapter)
    engine = engine_of(lab, model, native=native, inline_tokens=1)
    await engine.start(lab.album)
    await ask(engine, generation(prompt(SYSTEM, words(3, 1)), 1))
    wanted = prompt(SYSTEM, an_image(1, 9, 11), words(7, 3))
    (answer,) = await ask(engine, generation(wanted, 1))
    followers = [prompt(SYSTEM, an_image(2, 9, 11), words(5 + i, 4)) for i in range(3)]
    begun = len(model.sizes)
    answers = await asyncio.gather(*(ask(engine, generation(follower, 1)) for follower in followers))
    state = engine.describe()
    await engine.close()
    lab.check(wanted, answer)
    for follower, (given,) in zip(followers, answers, strict=True):
        lab.check(follower, given)
    assert sum(model.sizes[begun:]) == 99 + 5 + 6 + 7 + 9 * (not native)  # tokens; one image for all three
    assert max(model.sizes[begun:]) >= 99 + 5 + 6 + 7  # in one step, but for what comes before the image
    assert state.prefix_misses >= 2


@pytest.mark.parametrize(("isolated", "invariant", "steps"), [(False, False, 1), (True, True, 1), (True, False, 3)])
async def test_scores_take_one_step_unless_its_company_must_always_be_the_same(lab, isolated, invariant, steps):
    """The image, what the questions begin with alike, and the questions."""
    model = Watched(lab.adapter)
    engine = engine_of(lab, model, question_prefix_tokens=8, batch_invariant=invariant)
    await engine.start(lab.album)
    wanted = [
        tuple(
            ScoreItem(prompt(SYSTEM, an_image(number, 9, 11), [*words(9, 40), *words(2 + i, 50 + i)]), ((5,), (6, 7)))
            for i in range(5)
        )
        for number in range(2)
    ]
    first, second = [await engine.score(Scoring("s", items, isolated=isolated)) for items in wanted]
    await engine.close()
    assert model.sizes[-steps:] == ([99 + 9 + 20 + 5] if steps == 1 else [99, 9, 20 + 5])
    for items, scores in zip(wanted, (first, second), strict=True):
        lab.check_scores(items, scores)


async def test_who_is_let_in_last_may_cut_what_others_of_the_step_see(lab):
    """Behind one who waits for a prefix of this step comes one who shares half of what a third has."""
    model = Watched(lab.adapter, permits=2)
    engine = engine_of(lab, model)
    await engine.start(lab.album)
    shared = words(40, 1)
    wanted = [prompt(shared, words(20, 2)), prompt(words(50, 3)), prompt(shared, words(20, 4))]
    counts = [12, 3, 3]
    tasks = [asyncio.create_task(ask(engine, generation(wanted[0], counts[0], n=2)))]
    while len(model.sizes) < 3:  # noqa: ASYNC110 - the engine's thread is held in a forward
        await asyncio.sleep(0.001)
    for follower, count in zip(wanted[1:], counts[1:], strict=True):
        tasks.append(asyncio.create_task(ask(engine, generation(follower, count, n=2))))
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    for _ in range(40):
        model.permit()
    for each, answers in zip(wanted, await asyncio.gather(*tasks), strict=True):
        for answer in answers:
            lab.check(each, answer)
    await engine.close()


async def test_a_slow_models_steps_are_cut_to_the_time_they_may_take(lab):
    """1 ms a token and 80 ms a step: no more than 80 tokens at once, however long the prompt."""
    model = Watched(lab.adapter, token_seconds=0.001)
    engine = engine_of(lab, model, step_seconds=0.08)
    await engine.start(lab.album)
    wanted = prompt(an_image(1, 20, 30), words(9, 3))
    (answer,) = await ask(engine, generation(wanted, 3))
    await engine.close()
    lab.check(wanted, answer)
    assert model.sizes[0] == 128  # before anything was measured
    assert max(model.sizes[1:]) <= 80
    assert sum(model.sizes) == len(wanted.token_ids) + 2


def test_a_fast_models_steps_grow_to_their_bound():
    budget = StepBudget(PackedOptions(step_seconds=1.0))
    for _ in range(5):
        budget.note(budget.tokens(0), 0, budget.tokens(0) * 1e-4)
    assert budget.tokens(0) == 4096
    assert budget.tokens(32) == 512 - 32
    for _ in range(20):
        budget.note(0, 64, 10.0)  # what decoding takes says nothing of prompts
    assert budget.tokens(0) == 4096
    for _ in range(8):
        budget.note(512, 0, 512 * 0.005)
    assert 190 <= budget.tokens(0) <= 201


def test_each_requests_admission_is_told(lab):
    """Also when it comes in at the same time as a later sequence of a request that was admitted before."""
    core = EngineCore(lab.adapter, PackedOptions(max_running=2, kv_bytes=1 << 20, prefix_bytes=1 << 20), print)

    def submit(name: str, count: int, tokens: int) -> None:
        made = Request(name, name, kept=False)
        made.sequences = [laboratory.sequence(made, prompt(words(4 + i, i)), tokens) for i in range(count)]
        core.enqueue(made)

    submit("long", 1, 8)
    submit("many", 3, 4)
    core.step()
    submit("one", 1, 4)
    while core.step():  # many's second goes first; when that and the long one end, "one" comes in before many's third
        pass
    assert not core.scheduler.running and not len(core.scheduler.queue)
    admitted = [request.id for request, event in core.events if isinstance(event, Admitted)]
    assert sorted(admitted) == ["long", "many", "one"]


def test_a_prefix_erased_and_given_up_in_the_same_step_is_not_filled(lab):
    """An image is erased while a sequence waits for its embeddings, and that one steps back when they are there."""
    prefills, token = [], lab.adapter.shape.token_bytes
    options = PackedOptions(kv_bytes=64 * token, prefix_bytes=1 << 20, slab_tokens=64)
    core = EngineCore(lab.adapter, options, prefills.append)
    writer, looker = Request("writer", "writer", kept=False), Request("looker", "looker", kept=False)
    image = an_image(1, 9, 11)
    writer.sequences = [laboratory.sequence(writer, prompt(words(12, 1)), 100)]
    looker.sequences = [laboratory.sequence(looker, prompt(image, words(5, 1)), 3)]
    core.enqueue(writer)
    core.step()
    core.enqueue(looker)
    suffix, slot = writer.sequences[0], writer.sequences[0].slot
    while suffix.suffix_length < slot.capacity:
        core.step()
    assert core.forget([image.key], []) and len(core.scheduler.running) == 2
    prefills[0].rows = [(span, torch.zeros(image.tokens, lab.adapter.shape.hidden)) for span in prefills[0].node.images]
    core.scheduler.loaded(prefills[0], EmbeddingSource.TENSOR_CACHE, 0.0)
    core.step()  # the writer needs a longer slot
    assert core.scheduler.counters.preemptions and looker.sequences[0].admissions == 2
    core.step()
    assert not any(isinstance(event, LookonceError) for _, event in core.events)
    core.fail_all(LookonceError(ErrorKind.UNAVAILABLE, "over"))
    assert core.pool.used_slots == 0 and core.cache.bytes == 0


async def test_a_prefix_filled_for_one_who_waits_lets_another_wait(lab):
    """Who asked for it has gone and nobody runs: a second image that has no room yet is not refused."""
    room = 130 * lab.adapter.shape.token_bytes
    async with lab.engine(prefix_bytes=room) as engine:
        lab.album.gate = asyncio.Event()
        first, second = prompt(SYSTEM, an_image(1, 9, 11), words(5, 1)), prompt(SYSTEM, an_image(2, 9, 11), words(5, 2))
        gone = asyncio.create_task(ask(engine, generation(first, 3)))
        await state_of(engine, lambda state: state.running == 1)
        follower = asyncio.create_task(ask(engine, generation(first, 3)))
        await state_of(engine, lambda state: state.waiting == 1)
        gone.cancel()
        await state_of(engine, lambda state: state.running == 0)
        other = asyncio.create_task(ask(engine, generation(second, 3)))
        await state_of(engine, lambda state: state.waiting == 2)
        lab.album.gate.set()
        for wanted, task in ((first, follower), (second, other)):
            (answer,) = await task
            lab.check(wanted, answer)


async def state_of(engine, fits) -> EngineState:
    """Wait until the engine's state fits."""
    for _ in range(4000):
        if fits(engine.describe()):
            return engine.describe()
        await asyncio.sleep(0.005)
    raise AssertionError(engine.describe())
