"""Recurrent state in the packed engine: forked from a prefix's end, kept, bounded, evicted and erased with its KV."""

from __future__ import annotations

import asyncio

import pytest
import torch

from lm_service.engine.types import ScoreItem, Scoring
from tests.engine.lab import an_image, ask, generation, prompt, words
from tests.engine.recurrent_lab import KINDS, RecurrentLab

SYSTEM, IMAGE, OTHER = words(9, 1), an_image(1, 6, 16), an_image(2, 5, 4)


SLOW = ("qwen3_5_moe",)


@pytest.fixture(
    scope="module", params=[pytest.param(kind, marks=pytest.mark.slow) if kind in SLOW else kind for kind in KINDS]
)
def lab(request):
    return RecurrentLab(request.param)


@pytest.fixture(scope="module")
def delta():
    return RecurrentLab("qwen3_5")


async def test_many_questions_at_once_are_answered_as_alone(lab):
    """Of many lengths, in steps of few tokens: prefixes and suffixes are cut, decodes and prefills go together."""
    asked = [lab.own(prompt(SYSTEM, IMAGE, words(1 + 7 * n % 40, n))) for n in range(32)]
    async with lab.engine(step_tokens=48, burst_tokens=70) as engine:
        together = [answers[0] for answers in await asyncio.gather(*(ask(engine, generation(x, 5)) for x in asked))]
        assert lab.album.loads[IMAGE.key] == 1
        for wanted, answer in zip(asked, together, strict=True):
            lab.check(wanted, answer)
        (alone,) = await ask(engine, generation(asked[7], 5))
        assert alone.tokens == together[7].tokens
        timings = alone.finish.timings
        assert (timings.cached_tokens, timings.prefix_hit) == (9 + 96, True)
        assert timings.prefill_tokens == len(asked[7].token_ids) - 105


CHOICES = [((3,), (5, 7)), ((1, 2, 3), (1, 2, 4, 5, 6), (1, 2, 4, 9), (8, 2, 3)), ((4, 4, 4, 4),), ((6, 6), (6, 6, 7))]


@pytest.mark.parametrize("isolated", [False, True])
async def test_choices_fork_where_they_part(lab, isolated):
    begin = words(20, 50)
    items = [
        ScoreItem(lab.own(prompt(SYSTEM, IMAGE, [*begin[: 5 * n], *words(3 + 5 * n, 60 + n)])), CHOICES[n % 4])
        for n in range(8)
    ]
    async with lab.engine(step_tokens=48, burst_tokens=33, question_prefix_tokens=4) as engine:
        scores = await engine.score(Scoring("s", tuple(items), isolated=isolated))
        lab.check_scores(items, scores)
        alone = await engine.score(Scoring("s", (items[1],), isolated=isolated))
        lab.check_scores(items[1:2], alone)
        assert alone.logprobs[0] == pytest.approx(scores.logprobs[1], abs=1e-4)
        assert alone.cached_tokens == (105,)
        if isolated:  # the same to the last bit, whatever is beside it
            again, *_ = await asyncio.gather(
                engine.score(Scoring("s", tuple(items), isolated=True)),
                *(ask(engine, generation(item.prompt, 3)) for item in items),
            )
            assert again.logprobs == scores.logprobs


async def test_a_state_is_kept_at_each_images_end(lab):
    async with lab.engine(native=False) as engine:
        for second, cached in ((OTHER, 0), (an_image(3, 4, 4), 105), (OTHER, 105 + 2 + 20)):
            wanted = lab.own(prompt(SYSTEM, IMAGE, words(2, 9), second, words(6, 10)))
            (answer,) = await ask(engine, generation(wanted, 3))
            lab.check(wanted, answer)
            assert answer.finish.timings.cached_tokens == cached


@pytest.mark.parametrize("native", [False, True])
async def test_the_next_turn_goes_on_where_the_last_one_ended(lab, native):
    async with lab.engine(native=native) as engine:
        text = words(40, 21)
        first = lab.own(prompt(SYSTEM, IMAGE, text))
        (answer,) = await ask(engine, generation(first, 12))
        second = lab.own(prompt(SYSTEM, IMAGE, [*text, *answer.tokens, *words(5, 22)]))
        (further,) = await ask(engine, generation(second, 6))
        lab.check(second, further)
        assert further.finish.timings.cached_tokens == len(first.token_ids) + 11
        parted = lab.own(prompt(SYSTEM, IMAGE, [*text, *words(9, 23)]))  # as long as it, and then otherwise
        (other,) = await ask(engine, generation(parted, 6))
        lab.check(parted, other)
        assert other.finish.timings.cached_tokens == 105


async def test_several_answers_share_a_prompt(lab):
    wanted = lab.own(prompt(SYSTEM, IMAGE, words(12, 31)))
    async with lab.engine() as engine:
        one, two, three = await ask(engine, generation(wanted, 5, n=3))
        for answer in (one, two, three):
            lab.check(wanted, answer)


async def test_who_steps_back_goes_on_as_before(lab):
    """Slots and states for a few only: sequences grow, step back, and are computed again."""
    shape = lab.adapter.shape
    asked = [lab.own(prompt(SYSTEM, IMAGE, words(20 + n, 70 + n))) for n in range(6)]
    memory = 2 * max(256 * shape.token_bytes, 4 * 2 * shape.state_bytes)
    async with lab.engine(kv_bytes=memory, keep_answers=False) as engine:
        answers = await asyncio.gather(*(ask(engine, generation(x, 60)) for x in asked))
        for wanted, (answer,) in zip(asked, answers, strict=True):
            lab.check(wanted, answer)
        assert engine.describe().preemptions


async def test_no_more_run_than_there_are_states_for(delta):
    shape = delta.adapter.shape
    asked = [delta.own(prompt(SYSTEM, IMAGE, words(4 + n, 80 + n))) for n in range(6)]
    async with delta.engine(kv_bytes=2 * 3 * 2 * shape.state_bytes + 64 * shape.token_bytes, max_running=6) as engine:
        states, used = engine._core.states, []
        allocate = states.allocate
        states.allocate = lambda: used.append(states.used) or allocate()
        answers = await asyncio.gather(*(ask(engine, generation(x, 4)) for x in asked))
        for wanted, (answer,) in zip(asked, answers, strict=True):
            delta.check(wanted, answer)
        assert max(used) <= states.limit == 3 and len(states._free) <= 3
    with pytest.raises(Exception, match="of which recurrent states take half"):
        async with delta.engine(kv_bytes=3 * shape.state_bytes):
            pass


async def test_a_step_that_fails_has_changed_no_state(lab, monkeypatch):
    """It is computed again, part by part, from the same states."""
    asked = [lab.own(prompt(SYSTEM, IMAGE, words(10 + n, 90 + n))) for n in range(3)]
    forward, steps = lab.adapter.forward, []

    def failing(*inputs, **named):
        done = forward(*inputs, **named)
        steps.append(None)
        if len(steps) == 4:  # when all of it is computed
            raise RuntimeError("injected")
        return done

    monkeypatch.setattr(lab.adapter, "forward", failing)
    async with lab.engine(step_tokens=48, burst_tokens=48) as engine:
        answers = await asyncio.gather(*(ask(engine, generation(x, 6)) for x in asked))
    for wanted, (answer,) in zip(asked, answers, strict=True):
        lab.check(wanted, answer)
    assert len(steps) > 7


async def test_numbers_that_are_not_finite_stay_with_their_image(lab):
    bad, rows = an_image(5, 4, 4), lab.album.rows
    async with lab.engine() as engine:
        lab.album.rows = lambda reference: rows(reference) * (torch.nan if reference is bad else 1)
        asked = [lab.own(prompt(SYSTEM, image, words(6, 3))) for image in (IMAGE, bad, OTHER)]
        done = await asyncio.gather(*(ask(engine, generation(x, 3)) for x in asked), return_exceptions=True)
        assert isinstance(done[1], Exception)
        lab.check(asked[0], done[0][0])
        lab.check(asked[2], done[2][0])
        lab.album.rows = rows
        (again,) = await ask(engine, generation(asked[1], 3))  # nothing of it was kept
        lab.check(asked[1], again)


async def test_states_are_bounded_evicted_and_erased(delta):
    """Many images through a small cache; what is erased is wiped, and nothing of it is found again."""
    shape = delta.adapter.shape
    budget = 6 * (40 * shape.token_bytes + 2 * shape.state_bytes)
    async with delta.engine(prefix_bytes=budget) as engine:
        core = engine._core
        images = [an_image(100 + n, 4, 4 + n % 4) for n in range(24)]
        for number, image in enumerate(images):
            wanted = delta.own(prompt(SYSTEM, image, words(5, number)))
            answers = await asyncio.gather(*(ask(engine, generation(wanted, 3)) for _ in range(2)))
            delta.check(wanted, answers[1][0])
            held = sum(tensor.nbytes for node in core.cache for tensor in (*node.state.now, *node.state.following))
            held += sum(node.kv.nbytes for node in core.cache)
            assert held == core.cache.bytes <= budget
            assert core.states.used == 0 and len(core.states._free) <= core.states.limit
            if number % 5 == 4:
                concerned = [node for node in core.cache if any(span.reference == image for span in node.images)]
                kept = [tensor for node in concerned for tensor in node.state.now]
                assert kept and any(tensor.any() for tensor in kept)
                assert await engine.forget([image.key], []) == len(concerned)
                assert not any(tensor.any() for tensor in kept)
                (answer,) = await ask(engine, generation(wanted, 3))
                delta.check(wanted, answer)
                assert answer.finish.timings.cached_tokens == 9
        assert not any(tensor.any() for state in core.states._free for tensor in (*state.now, *state.following))
        assert engine.describe().prefix_evictions
