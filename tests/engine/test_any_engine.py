"""What every engine does, ours and another's: the same questions to both, by nothing but the six verbs."""

from __future__ import annotations

import asyncio
import os
import time
from types import SimpleNamespace

import pytest

from lm_service.engine.factory import builder_of
from lm_service.engine.packed.build import PackedBuilder
from lm_service.engine.types import Delta, Finish, FinishReason, Generation, Sampling, ScoreItem, Scoring
from lm_service.settings import LanguageSettings
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.models.checkpoint import Half, open_checkpoint
from tests.engine.lab import TOKENS, Album, an_image, ask, generation, prompt, words
from tests.other_engines.plain import PlainBuilder
from tests.vllm.shared import VllmBuilder

CONTEXT = 400
SYSTEM = words(9, 1)
WANTED = [
    prompt(words(12, 2)),
    prompt(SYSTEM, an_image(1, 4, 5), words(6, 3)),
    prompt(SYSTEM, an_image(1, 4, 5), words(4, 4), an_image(2, 2, 7), words(3, 5)),
]


ENGINES = [VllmBuilder] if os.environ.get("LOOKONCE_TEST_ENGINE") == "vllm" else [PackedBuilder, PlainBuilder]
"""vLLM's in its own environment: `make test-vllm`."""


@pytest.fixture(params=ENGINES)
async def engine(request, checkpoint_path, lab):
    """Started, over an album; closed afterwards."""
    settings = LanguageSettings(
        model=str(checkpoint_path), device="cpu", dtype="float32", kv_bytes="4MiB", prefix_bytes="4MiB"
    )
    checkpoint = open_checkpoint(str(checkpoint_path), needs=Half.LANGUAGE)
    made = request.param(settings).build(checkpoint, TOKENS, frozenset(), CONTEXT)
    assert made.describe().model.context_length == CONTEXT
    lab.album = Album(lab.adapter.shape.hidden)
    lab.album.as_records = request.param is VllmBuilder
    await made.start(lab.album)
    yield made
    await made.close()


async def idle(engine):
    async with asyncio.timeout(30):
        while engine.describe().running or engine.describe().waiting:  # noqa: ASYNC110 - an engine tells nobody
            await asyncio.sleep(0.005)


async def collected(stream):
    return [event async for event in stream]


async def refusal(work):
    with pytest.raises(LookonceError) as caught:
        await work
    return caught.value.kind


def plain(wanted, max_tokens=6, **rest):
    return generation(wanted, max_tokens, logprobs=None, **rest)


async def test_greedy_answers_are_transformers(engine, lab):
    answers = await asyncio.gather(*(ask(engine, plain(wanted)) for wanted in WANTED))
    for wanted, (answer,) in zip(WANTED, answers, strict=True):
        best = lab.logits(wanted, answer.tokens).argmax(-1)[len(wanted.token_ids) - 1 : -1]
        assert answer.tokens == best.tolist()
        assert (answer.finish.reason, answer.finish.completion_tokens) == (FinishReason.LENGTH, 6)
        assert 0 < answer.finish.timings.ttft_ms <= answer.finish.timings.total_ms
    assert len({tuple(answer.tokens) for (answer,) in answers}) == 3


async def test_scores_are_the_log_probabilities_of_the_choices(engine, lab):
    items = [ScoreItem(wanted, ((5,), (6, 7), (6, 8))) for wanted in WANTED]
    for isolated in (False, True):
        lab.check_scores(items, await engine.score(Scoring("s", tuple(items), isolated=isolated)))


async def test_isolated_scores_are_the_same_bits(engine):
    items = tuple(ScoreItem(wanted, ((5,), (6, 7))) for wanted in WANTED)
    alone = [(await engine.score(Scoring("s", (item,), isolated=True))).logprobs[0] for item in items]
    beside = asyncio.create_task(ask(engine, plain(WANTED[0], 20)))
    assert list((await engine.score(Scoring("s", items, isolated=True))).logprobs) == alone
    await beside


async def test_what_is_forgotten_is_loaded_again(engine, lab):
    for _ in range(2):
        await ask(engine, plain(WANTED[1]))
        await idle(engine)
        await engine.forget([an_image(1, 4, 5).key], [])
    assert lab.album.loads[an_image(1, 4, 5).key] == 2


async def test_a_deadline_ends_a_request(engine, lab):
    lab.album.gate = asyncio.Event()  # the embedding never comes
    began = time.monotonic()
    assert await refusal(ask(engine, plain(WANTED[1], deadline=began + 0.1))) is ErrorKind.DEADLINE_EXCEEDED
    scoring = Scoring("s", (ScoreItem(WANTED[1], ((5,),)),), deadline=time.monotonic() + 0.1)
    assert await refusal(engine.score(scoring)) is ErrorKind.DEADLINE_EXCEEDED
    assert time.monotonic() - began < 5
    lab.album.gate.set()
    await idle(engine)


async def test_who_goes_away_costs_nothing_more(engine):
    stream = engine.generate(plain(WANTED[0], 300, ignore_eos=True))
    assert isinstance(await anext(stream), Delta)
    await stream.aclose()
    await idle(engine)
    (answer,) = await ask(engine, plain(WANTED[0]))
    assert len(answer.tokens) == 6


async def test_close_ends_everything(engine, lab):
    lab.album.gate = asyncio.Event()
    asked = [asyncio.create_task(ask(engine, plain(wanted, 300))) for wanted in WANTED[1:]]
    asked.append(asyncio.create_task(engine.score(Scoring("s", (ScoreItem(WANTED[1], ((5,),)),)))))
    await asyncio.sleep(0.05)
    await engine.close()
    for task in asked:
        assert await refusal(task) is ErrorKind.UNAVAILABLE
    assert await refusal(ask(engine, plain(WANTED[0]))) is ErrorKind.UNAVAILABLE


async def test_several_answers_or_a_clear_refusal(engine):
    work = ask(engine, plain(WANTED[1], n=3, temperature=1.0, seed=5))
    (outcome,) = await asyncio.gather(work, return_exceptions=True)
    if isinstance(outcome, LookonceError):
        assert outcome.kind is ErrorKind.INVALID_ARGUMENT and outcome.param in ("n", "temperature")
    else:
        assert [len(answer.tokens) for answer in outcome] == [6] * 3


@pytest.mark.parametrize("engine", [one for one in ENGINES if one is not PlainBuilder], indirect=True)
async def test_tokens_are_biased_allowed_barred_and_end_an_answer(engine):
    """Of ours: the other one samples by transformers."""
    (free,) = await ask(engine, plain(WANTED[1], 8))
    assert [one.tokens for one in await ask(engine, plain(WANTED[1], 4, bias=((7, 100.0),)))] == [[7] * 4]
    (allowed,) = await ask(engine, plain(WANTED[1], 8, allowed=(3, 5)))
    assert set(allowed.tokens) <= {3, 5}
    (barred,) = await ask(engine, plain(WANTED[1], 8, bad_words=(tuple(free.tokens[1:3]),)))
    assert barred.tokens[:2] == free.tokens[:2] and barred.tokens[2] != free.tokens[2]
    (ended,) = await ask(engine, plain(WANTED[1], 8, stop_ids=(free.tokens[2],)))
    assert ended.tokens == free.tokens[: free.tokens.index(free.tokens[2]) + 1]


async def test_a_stop_string_ends_an_answer_before_it(engine):
    (whole,) = await ask(engine, plain(WANTED[1], 8))
    stop = whole.text[3:5]
    (answer,) = await ask(engine, plain(WANTED[1], 8, stop=(stop,)))
    assert answer.text == whole.text[: whole.text.index(stop)]
    assert (answer.finish.reason, answer.finish.stop) == (FinishReason.STOP, stop)


async def test_a_whole_answer_comes_in_one_delta(engine):
    events = await collected(engine.generate(Generation("w", WANTED[0], Sampling(6), whole=True)))
    assert [type(event) for event in events] == [Delta, Finish] and len(events[0].token_ids) == 6


async def test_a_lost_embedding_fails_those_who_need_it(engine, lab):
    lab.album.lost.add(an_image(2, 2, 7).key)
    lost, kept = ask(engine, plain(WANTED[2])), ask(engine, plain(WANTED[1]))
    failure, (answer,) = await asyncio.gather(lost, kept, return_exceptions=True)
    assert isinstance(failure, LookonceError) and failure.kind is ErrorKind.EMBEDDING_MISSING
    assert len(answer.tokens) == 6
    scoring = Scoring("s", (ScoreItem(WANTED[2], ((5,),)),))
    assert await refusal(engine.score(scoring)) is ErrorKind.EMBEDDING_MISSING


async def test_a_prompt_beyond_the_context_is_refused(engine):
    assert await refusal(ask(engine, plain(prompt(words(CONTEXT, 1))))) is ErrorKind.CONTEXT_LENGTH_EXCEEDED


def test_an_engine_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(LookonceError) as caught:
        builder_of(SimpleNamespace(engine="steam"))
    assert caught.value.kind is ErrorKind.INVALID_ARGUMENT and "packed" in caught.value.message
