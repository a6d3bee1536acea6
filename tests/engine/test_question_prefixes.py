"""What questions of one request begin with alike is computed once, and changes no score by more than rounding."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_service.engine.packed.scheduling.prefix_policy import find_shared_ends
from lm_service.engine.types import ScoreItem, Scoring
from tests.engine.lab import an_image, ask, generation, prompt, words

SYSTEM = words(9, 1)
CHOICES = ((5,), (6, 7), (6, 8, 9))
SHARED = [words(8, 40), [*words(8, 40), *words(9, 41)], [*words(8, 40), *words(9, 42)], words(11, 43)]


def questions(image, count: int = 11) -> tuple[ScoreItem, ...]:
    """Some begin with the same eight tokens, and of those some with the same nine more; others with the same eleven."""
    return tuple(
        ScoreItem(prompt(SYSTEM, image, [*SHARED[i % 4], *words(2 + i, 50 + i)]), CHOICES[: 1 + i % 3])
        for i in range(count)
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"native": False},
        {"native": False, "inline_tokens": 1},
        {"step_tokens": 3, "burst_tokens": 5},
        {"max_running": 2},
        {"kv_bytes": 2 * 64 * 1024, "slab_tokens": 64},
    ],
    ids=["kernels", "torch", "torch sharing all", "small steps", "few places", "little memory"],
)
async def test_scores_are_exact(lab, options):
    items = questions(an_image(1, 9, 11))
    for isolated in (False, True):
        async with lab.engine(question_prefix_tokens=8, **options) as engine:
            lab.check_scores(items, await engine.score(Scoring("s", items, isolated=isolated)))


async def test_each_stem_is_computed_once(lab):
    items = tuple(
        ScoreItem(prompt(SYSTEM, an_image(1, 9, 11), [*words(20, 40), *words(4, 50 + i)]), ((5,),)) for i in range(6)
    )
    whole = len(items[0].prompt.token_ids)
    for question_prefix_tokens, computed in ((1, 108 + 20 + 6 * 4), (100, 108 + 20 + 6 * 4), (101, 108 + 6 * 24)):
        async with lab.engine(question_prefix_tokens=question_prefix_tokens) as engine:
            scores = await engine.score(Scoring("s", items))
            assert engine.describe().prefill_tokens == computed
            assert sum(scores.cached_tokens) == 6 * whole - computed
            lab.check_scores(items, scores)


@pytest.mark.parametrize("invariant", [False, True])
async def test_the_bits_depend_on_the_request_alone(lab, invariant):
    """Not on what others left in the cache, not on how many places there are, not on what runs beside."""
    images = [an_image(number, 9, 8 + number % 3) for number in range(4)]
    requests = [Scoring(f"s{number}", questions(image), isolated=True) for number, image in enumerate(images)]
    async with lab.engine(question_prefix_tokens=8, batch_invariant=invariant) as engine:
        quiet = [(await engine.score(request)).logprobs for request in requests]
        assert [(await engine.score(request)).logprobs for request in requests] == quiet
    for places in (2, 128):
        async with lab.engine(question_prefix_tokens=8, batch_invariant=invariant, max_running=places) as engine:
            others = [Scoring("o", questions(image, 3) + questions(image, 1)) for image in images]
            talks = [prompt(SYSTEM, image, SHARED[1]) for image in images]
            beside = [asyncio.create_task(engine.score(other)) for other in others]
            beside += [asyncio.create_task(ask(engine, generation(talk, 40, logprobs=None))) for talk in talks]
            first = await asyncio.gather(*(engine.score(request) for request in requests))
            await asyncio.gather(*beside)
            again = await asyncio.gather(*(engine.score(request) for request in reversed(requests)))
        assert [scores.logprobs for scores in first] == quiet
        assert [scores.logprobs for scores in reversed(again)] == quiet


async def test_who_leaves_in_the_middle_leaves_nothing(lab):
    items = questions(an_image(1, 9, 11))
    for steps in range(6):
        async with lab.engine(question_prefix_tokens=8, step_tokens=30, burst_tokens=30) as engine:
            leaving = asyncio.create_task(engine.score(Scoring("l", items)))
            staying = asyncio.create_task(engine.score(Scoring("s", items)))
            while engine.describe().steps < steps:  # noqa: ASYNC110 - the engine tells nobody of its steps
                await asyncio.sleep(0.0005)
            leaving.cancel()
            await asyncio.wait([leaving])
            lab.check_scores(items, await staying)


RESTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(rests=RESTS, worth=st.integers(1, 12))
def test_stems_are_common_beginnings(rests, worth):
    """Each is shared, ends before the last token, and all together spare what was asked for; in any order the same."""
    ends = find_shared_ends(rests, worth)
    levels = {rest[:end] for rest, own in zip(rests, ends, strict=True) for end in own}
    for stem in levels:
        assert sum(len(stem) in own and rest[: len(stem)] == stem for rest, own in zip(rests, ends, strict=True)) > 1
    for rest, own in zip(rests, ends, strict=True):
        assert list(own) == sorted(set(own)) and all(0 < end < len(rest) for end in own)
    computed = {
        rest[:end]: end - begin
        for rest, own in zip(rests, ends, strict=True)
        for begin, end in zip((0, *own), own, strict=False)
    }
    spared = sum(max(own, default=0) for own in ends) - sum(computed.values())
    assert spared >= worth * len(levels)
    assert find_shared_ends(rests[::-1], worth) == ends[::-1]


def test_more_nested_questions_than_python_nests_calls():
    rests = [tuple([1] * length) for length in range(2, 3000)]
    assert len(find_shared_ends(rests, 8)) == len(rests)
