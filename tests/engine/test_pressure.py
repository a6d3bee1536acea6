"""Too little memory, too many requests, callers who leave: each answer is exact or refused, and nothing is kept."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm_service.engine.packed.scheduling.sequence import Sequence
from lm_service.engine.types import FinishReason, ScoreItem, Scoring
from lookonce.core.errors import ErrorKind, LookonceError
from tests.engine.lab import Answered, an_image, ask, drained, generation, prompt, words

SYSTEM = words(9, 1)
TOKEN_BYTES = 2 * 2 * 2 * 16 * 4


async def test_a_thousand_requests_on_16_slots(lab):
    """All end, each with its own answer, none twice; clients take turns."""
    asked = [prompt(SYSTEM, an_image(i % 7, 3, 4), words(2 + i % 5, i % 50)) for i in range(1000)]
    async with lab.engine(max_running=16, max_waiting=1000) as engine:
        most = 0

        async def one(i: int) -> list[int]:
            nonlocal most
            (answer,) = await ask(engine, generation(asked[i], 1 + i % 3, logprobs=None, client=f"client-{i % 9}"))
            most = max(most, engine.describe().running)
            return answer.tokens

        answers = await asyncio.gather(*(one(i) for i in range(1000)))
        assert most <= 16
        assert engine.describe().generated_tokens == sum(map(len, answers))
        assert lab.album.loads.total() == 7
    for i in range(0, 1000, 41):
        expected = lab.logits(asked[i], answers[i]).argmax(-1)[len(asked[i].token_ids) - 1 : -1].tolist()
        assert answers[i] == expected and len(answers[i]) == 1 + i % 3


async def test_a_full_queue_refuses_at_once(lab):
    async with lab.engine(max_running=1, max_waiting=2) as engine:
        running = engine.generate(generation(prompt(words(5, 1)), 4000, logprobs=None))
        await anext(running)
        waiting = [asyncio.create_task(ask(engine, generation(prompt(words(5, 2)), 2))) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(LookonceError) as refused:
            await ask(engine, generation(prompt(words(5, 3)), 2))
        assert refused.value.kind is ErrorKind.OVERLOADED and refused.value.retry_after
        await running.aclose()
        for (answer,) in await asyncio.gather(*waiting):
            lab.check(prompt(words(5, 2)), answer)


async def test_leaving_frees_the_slot_within_a_step(lab):
    async with lab.engine(max_running=2) as engine:
        stream = engine.generate(generation(prompt(SYSTEM, an_image(1), words(5, 1)), 4000, logprobs=None))
        await anext(stream)
        await stream.aclose()
        await drained(engine)
        state = engine.describe()
        assert state.running == 0 and state.kv_slots == 0
        assert state.generated_tokens < 4000


async def test_a_client_with_many_questions_does_not_hold_up_another(lab):
    async with lab.engine(max_running=2) as engine:
        ended: list[str] = []

        async def one(client: str, i: int) -> None:
            await ask(engine, generation(prompt(words(6, i)), 3, client=client))
            ended.append(client)

        before = [engine.generate(generation(prompt(words(5, i)), 4000, logprobs=None)) for i in range(2)]
        for stream in before:
            await anext(stream)  # both places are taken, so that all the others wait
        waiting = [asyncio.create_task(one("many", i)) for i in range(40)]
        waiting.append(asyncio.create_task(one("single", 99)))
        await asyncio.sleep(0)
        for stream in before:
            await stream.aclose()
        await asyncio.gather(*waiting)
        assert ended.index("single") < 10


async def test_deadlines(lab):
    async with lab.engine(max_running=1) as engine:
        stream = engine.generate(generation(prompt(words(5, 1)), 4000, logprobs=None))
        await anext(stream)
        for deadline in (time.monotonic() - 1, time.monotonic() + 0.01):
            with pytest.raises(LookonceError) as late:
                await ask(engine, generation(prompt(words(5, 2)), 200, deadline=deadline))
            assert late.value.kind is ErrorKind.DEADLINE_EXCEEDED
            with pytest.raises(LookonceError) as late:
                await engine.score(Scoring("s", (ScoreItem(prompt(words(5, 2)), ((1,),)),), deadline=deadline))
            assert late.value.kind is ErrorKind.DEADLINE_EXCEEDED
        await stream.aclose()


async def test_preempted_sequences_go_on_where_they_stopped(lab):
    """Slots for the beginnings only: as answers grow, the youngest step back and return."""
    asked = [prompt(words(10, i)) for i in range(12)]
    salts = [bytes([i % 2]) * 32 for i in range(12)]
    async with lab.engine(kv_bytes=6 * 64 * TOKEN_BYTES, prefix_bytes=64 * TOKEN_BYTES, slab_tokens=64) as engine:
        requests = [generation(wanted, 30, salt=salt) for wanted, salt in zip(asked, salts, strict=True)]
        answers = await asyncio.gather(*(ask(engine, request) for request in requests))
        assert engine.describe().preemptions > 0
        for wanted, (answer,) in zip(asked, answers, strict=True):
            lab.check(wanted, answer)


async def test_answers_longer_than_a_slab(lab):
    wanted = prompt(SYSTEM, an_image(1, 5, 5), words(5, 1))
    async with lab.engine(slab_tokens=64) as engine:
        (answer,) = await ask(engine, generation(wanted, 200))
        lab.check(wanted, answer)


async def test_prefixes_beyond_the_budget_are_evicted(lab):
    budget = 400 * TOKEN_BYTES
    async with lab.engine(prefix_bytes=budget) as engine:
        for round_ in range(2):
            for i in range(6):
                wanted = prompt(SYSTEM, an_image(i, 9, 11), words(40, i + 10 * round_))
                (answer,) = await ask(engine, generation(wanted, 3))
                lab.check(wanted, answer)
                assert engine.describe().prefix_bytes <= budget
        assert engine.describe().prefix_evictions > 0
        assert lab.album.loads.total() == 12


async def test_an_images_kv_is_held_once(lab):
    """32 sequences in mid-answer on one image: its prefix once, and 32 small slots."""
    image = an_image(1, 9, 11)
    async with lab.engine(keep_answers=False) as engine:
        streams = [
            engine.generate(generation(prompt(SYSTEM, image, words(5, i)), 200, logprobs=None)) for i in range(32)
        ]
        await asyncio.gather(*(anext(stream) for stream in streams))
        state = engine.describe()
        assert state.running == 32 and state.kv_slots == 32
        assert state.prefix_bytes == (9 + 99) * TOKEN_BYTES
        assert state.prefill_tokens == 9 + 99 + 32 * 5
        assert (state.prefix_misses, state.prefix_hits) == (1, 31)
        for stream in streams:
            await stream.aclose()
        await drained(engine)
        assert engine.describe().prefix_bytes == (9 + 99) * TOKEN_BYTES


async def test_what_has_ended_is_gone_without_garbage_collection(lab):
    """Prompts of a thousand image tokens are not small; collections of the oldest generation are rare."""
    wanted = prompt(SYSTEM, an_image(1, 5, 5), words(7, 3))
    gc.collect()
    gc.disable()
    try:
        async with lab.engine() as engine:
            for _ in range(4):
                await asyncio.gather(*(ask(engine, generation(wanted, 2, n=2)) for _ in range(4)))
                await engine.score(Scoring("s", (ScoreItem(wanted, ((1,), (2, 3))),) * 8))
            await drained(engine)
            alive = sum(type(thing) is Sequence for thing in gc.get_objects())
    finally:
        gc.enable()
    assert alive <= 16, "more than the last step's"


async def test_what_can_never_fit_is_refused(lab):
    async with lab.engine(prefix_bytes=100 * TOKEN_BYTES) as engine:
        with pytest.raises(LookonceError) as refused:
            await ask(engine, generation(prompt(SYSTEM, an_image(1, 12, 12), words(5, 1)), 3))
        assert refused.value.kind is ErrorKind.CONTEXT_LENGTH_EXCEEDED and "prefix_bytes" in refused.value.message
        (answer,) = await ask(engine, generation(prompt(SYSTEM, an_image(1, 5, 5), words(5, 1)), 3))
        lab.check(prompt(SYSTEM, an_image(1, 5, 5), words(5, 1)), answer)


ACTION = st.tuples(
    st.sampled_from(["generate", "generate", "generate", "several", "score", "forget"]),
    st.integers(0, 5),  # image; from 4 on: none
    st.integers(1, 60),  # length of the text
    st.integers(0, 3),  # which text
    st.integers(1, 30),  # tokens wanted
    st.one_of(st.none(), st.none(), st.integers(0, 6)),  # leave after so many events
    st.integers(0, 3),  # turns of the event loop before the next
)


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    actions=st.lists(ACTION, min_size=1, max_size=16),
    slots=st.integers(1, 9),
    slabs=st.integers(1, 6),
    prefixes=st.integers(130, 500),
    step=st.sampled_from([3, 16, 512]),
    inline=st.sampled_from([1, 24, 64]),
)
def test_any_schedule(lab, actions, slots, slabs, prefixes, step, inline):
    """Arrivals, departures, forgetting, eviction and preemption in any order: answers are exact, nothing leaks."""
    asyncio.run(_run_schedule(lab, actions, slots, slabs, prefixes, step, inline))


async def _run_schedule(lab, actions, slots, slabs, prefixes, step, inline):
    options = {
        "max_running": slots,
        "kv_bytes": slabs * 64 * TOKEN_BYTES,
        "prefix_bytes": prefixes * TOKEN_BYTES,
        "slab_tokens": 64,
        "step_tokens": step,
        "burst_tokens": 2 * step,
        "inline_tokens": inline,
        "long_suffix_tokens": 40,
    }
    async with lab.engine(**options) as engine:
        tasks = []
        for kind, image, length, text, tokens, leave, turns in actions:
            parts = [SYSTEM, an_image(image, 4 + image, 9)] if image < 4 else [SYSTEM * 5]
            wanted = prompt(*parts, words(60, text)[:length])
            if kind == "forget":
                tasks.append(asyncio.create_task(engine.forget([], [an_image(image % 4).image_digest])))
            elif kind == "score":
                tasks.append(asyncio.create_task(_score(lab, engine, wanted)))
            else:
                n = min(slots, 3) if kind == "several" else 1
                tasks.append(asyncio.create_task(_answer(lab, engine, wanted, tokens, n, leave)))
            for _ in range(turns):
                await asyncio.sleep(0.002)
        await asyncio.gather(*tasks)
        assert engine.describe().prefix_bytes <= options["prefix_bytes"]


async def _answer(lab, engine, wanted, tokens, n, leave):
    answers = [Answered() for _ in range(n)]
    events = 0
    async with contextlib.aclosing(engine.generate(generation(wanted, tokens, n=n, logprobs=9))) as stream:
        async for event in stream:
            answers[event.index].take(event)
            assert engine.describe().prefix_bytes <= engine.options.prefix_bytes
            events += 1
            if events == leave:
                break
    for answer in answers:
        lab.check(wanted, answer)
        assert leave is not None or (len(answer.tokens) == tokens and answer.finish.reason is FinishReason.LENGTH)


async def _score(lab, engine, wanted):
    items = (ScoreItem(wanted, ((3,), (4, 5), (4, 6, 7))),)
    lab.check_scores(items, await engine.score(Scoring("s", items)))
