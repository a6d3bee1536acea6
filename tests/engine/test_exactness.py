"""Whatever runs beside it and however it is cut: every answer is what transformers gives for its prompt alone."""

from __future__ import annotations

import asyncio
import copy

import pytest
import torch

from lm_service.engine.types import EmbeddingSource, ScoreItem, Scoring
from tests.engine.lab import Lab, an_image, ask, generation, prompt, words

SYSTEM = words(9, 1)


async def test_text_alone(lab):
    async with lab.engine() as engine:
        wanted = prompt(words(17, 2))
        (answer,) = await ask(engine, generation(wanted, 12))
        lab.check(wanted, answer)
        assert len(answer.tokens) == 12


async def test_one_image(lab):
    async with lab.engine() as engine:
        wanted = prompt(SYSTEM, an_image(1, 9, 11), words(7, 3))
        (answer,) = await ask(engine, generation(wanted, 6))
        lab.check(wanted, answer)
        assert answer.finish.timings.embedding is EmbeddingSource.STORE
        assert not answer.finish.timings.prefix_hit and answer.finish.timings.cached_tokens == 0
        (again,) = await ask(engine, generation(prompt(SYSTEM, an_image(1, 9, 11), words(11, 4)), 6))
        lab.check(prompt(SYSTEM, an_image(1, 9, 11), words(11, 4)), again)
        assert again.finish.timings.prefix_hit and again.finish.timings.cached_tokens == 9 + 99
        assert again.finish.timings.embedding is EmbeddingSource.NOT_NEEDED
        assert lab.album.loads.total() == 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"native": False},
        {"step_tokens": 5, "burst_tokens": 7},
        {"inline_tokens": 1},
        {"inline_tokens": 1, "native": False},
        {"inline_tokens": 400},
    ],
)
async def test_32_neighbours(lab, options):
    """Many questions on few images at once, small images too, whatever the chunks and whether prefixes are copied."""
    images = [an_image(1, 9, 11), an_image(2, 2, 3), an_image(3, 5, 20)]
    prompts = [prompt(SYSTEM, images[i % 3], words(3 + i % 13, 100 + i)) for i in range(30)]
    prompts += [prompt(words(40, 7)), prompt(SYSTEM, images[0], words(4, 8), images[2], words(5, 9))]
    async with lab.engine(**options) as engine:
        answers = await asyncio.gather(
            *(ask(engine, generation(wanted, 3 + i % 5)) for i, wanted in enumerate(prompts))
        )
        for wanted, (answer,) in zip(prompts, answers, strict=True):
            lab.check(wanted, answer)
        # image 1 alone and as the beginning of two; 2; 3; then 3 after 1
        assert lab.album.loads == {images[0].key: 1, images[1].key: 1, images[2].key: 2}


async def test_alone_and_in_company_the_text_is_the_same(lab):
    prompts = [prompt(SYSTEM, an_image(5, 8, 8), words(4 + i, 200 + i)) for i in range(16)]
    async with lab.engine() as engine:
        alone = [(await ask(engine, generation(wanted, 8)))[0] for wanted in prompts]
    async with lab.engine() as engine:
        together = await asyncio.gather(*(ask(engine, generation(wanted, 8)) for wanted in prompts))
    assert [answer.tokens for answer in alone] == [answer.tokens for (answer,) in together]


async def test_conversation_reuses_its_turns(lab):
    """A turn's question and answer become the prefix of the next."""
    image = an_image(6, 6, 9)
    parts: list = [SYSTEM, image]
    async with lab.engine() as engine:
        cached = 0
        for turn in range(4):
            parts.append(words(40, 300 + turn))
            wanted = prompt(*parts)
            (answer,) = await ask(engine, generation(wanted, 20))
            lab.check(wanted, answer)
            assert answer.finish.timings.cached_tokens == cached
            # all but the last token of the answer, which was sampled but never fed
            cached = len(wanted.token_ids) + 19
            parts.append(answer.tokens)
        assert lab.album.loads.total() == 1


async def test_text_prefix_is_found_where_prompts_part(lab):
    document = words(150, 20)
    async with lab.engine(long_suffix_tokens=64) as engine:
        first, second = prompt(document, words(9, 21)), prompt(document, words(12, 22))
        (answer,) = await ask(engine, generation(first, 5))
        lab.check(first, answer)
        (answer,) = await ask(engine, generation(second, 5))
        lab.check(second, answer)
        assert answer.finish.timings.cached_tokens == 150 and answer.finish.timings.prefix_hit
        both = await asyncio.gather(*(ask(engine, generation(wanted, 9)) for wanted in (first, second) * 8))
        for wanted, (answer,) in zip((first, second) * 8, both, strict=True):
            lab.check(wanted, answer)


async def test_splitting_a_prefix_in_use(lab):
    """A second prompt parts from one whose sequence is still running on the stretch that is cut."""
    document = words(120, 30)
    first, second = prompt(document, words(30, 31)), prompt(document, words(14, 32))
    async with lab.engine(long_suffix_tokens=32) as engine:
        stream = engine.generate(generation(first, 60))
        got = [await anext(stream)]
        (answer,) = await ask(engine, generation(second, 5))
        lab.check(second, answer)
        assert answer.finish.timings.cached_tokens == 120
        got += [event async for event in stream]
        tokens = [token for event in got[:-1] for token in event.token_ids]
        assert tokens == lab.logits(first, tokens).argmax(-1)[len(first.token_ids) - 1 : -1].tolist()


async def test_n_answers_share_the_prompt(lab):
    wanted = prompt(SYSTEM, an_image(1, 9, 11), words(21, 40))
    async with lab.engine() as engine:
        answers = await ask(engine, generation(wanted, 6, n=5))
        for answer in answers:
            lab.check(wanted, answer)
        prefilled = engine.describe().prefill_tokens
        # the last token of the prompt is fed once for each answer, all others once
        assert prefilled == len(wanted.token_ids) - 1 + 5


async def test_scores(lab):
    """Choices of one and of several tokens, with and without a common beginning."""
    choices = ((5,), (6,), (5, 9), (5, 9, 11), (5, 9, 12), (7, 8, 9))
    items = [
        ScoreItem(prompt(SYSTEM, an_image(1, 9, 11), words(3 + i, 50 + i)), choices[: 2 + i % 5]) for i in range(12)
    ]
    for options in ({}, {"native": False}, {"step_tokens": 4, "burst_tokens": 5}):
        async with lab.engine(**options) as engine:
            scores = await engine.score(Scoring("s", tuple(items)))
            assert lab.album.loads.total() == 1
            assert scores.cached_tokens == (0, *[108] * 11)
            lab.check_scores(items, scores)


async def test_scores_alone_are_the_same_bits_whatever_else_is_asked(lab):
    def scoring(number):
        items = [
            ScoreItem(prompt(SYSTEM, an_image(number, 9, 8 + number % 3), words(3 + i, 50 + i)), ((5,), (6, 7)))
            for i in range(5)
        ]
        return Scoring(f"s{number}", tuple(items), isolated=True)

    async with lab.engine() as engine:
        quiet = [(await engine.score(scoring(number))).logprobs for number in range(8)]
    async with lab.engine() as engine:
        beside = [
            asyncio.create_task(ask(engine, generation(prompt(SYSTEM, an_image(20 + i, 5, 5), words(9, 60 + i)), 12)))
            for i in range(4)
        ]
        busy = await asyncio.gather(*(engine.score(scoring(number)) for number in reversed(range(8))))
        await asyncio.gather(*beside)
    assert [scores.logprobs for scores in reversed(busy)] == quiet


async def test_scores_beside_answers(lab):
    asked = [prompt(SYSTEM, an_image(i % 2, 9, 11), words(9, 60 + i)) for i in range(6)]
    items = [ScoreItem(wanted, ((1, 2), (1, 3), (4,))) for wanted in asked]
    async with lab.engine() as engine:
        answers, alone = await asyncio.gather(
            asyncio.gather(*(ask(engine, generation(wanted, 7)) for wanted in asked)),
            asyncio.gather(*(engine.score(Scoring("s", (item,))) for item in items)),
        )
        together = await engine.score(Scoring("s", tuple(items)))
    for wanted, (answer,) in zip(asked, answers, strict=True):
        lab.check(wanted, answer)
    torch.testing.assert_close(
        torch.tensor([scores.logprobs[0] for scores in alone]), torch.tensor(together.logprobs), atol=2e-4, rtol=0
    )


async def test_half_precision_rounds_as_little_as_transformers(checkpoint_path):
    """The same weights and embeddings in bfloat16, theirs and ours, each against the same in float32.

    Both round at every operation, each in its own places, so neither can be the other's reference. What can be asked is
    that ours is no further off: by the root mean square over 80 whole distributions, which varies little, within a
    tenth; by the largest of 40,000 deviations, which varies more, within a half."""
    lab = Lab(checkpoint_path, torch.bfloat16)
    exact = copy.deepcopy(lab.text_model).float(), copy.deepcopy(lab.head).float()
    asked = [prompt(SYSTEM, an_image(i, 9, 11), words(9, 3 + i)) for i in range(8)]
    async with lab.engine() as engine:
        rows = lab.album.rows
        lab.album.rows = lambda reference: rows(reference).bfloat16().float()
        answers = await asyncio.gather(*(ask(engine, generation(wanted, 10)) for wanted in asked))
        given, theirs, expected = [], [], []
        for wanted, (answer,) in zip(asked, answers, strict=True):
            given += [[value for _, value in sorted(row.top)] for row in answer.logprobs]
            told = slice(len(wanted.token_ids) - 1, -1)
            theirs.append(lab.logits(wanted, answer.tokens)[told].float().log_softmax(-1))
            (lab.text_model, lab.head), half = exact, (lab.text_model, lab.head)
            expected.append(lab.logits(wanted, answer.tokens)[told].log_softmax(-1))
            lab.text_model, lab.head = half
    ours = torch.tensor(given) - torch.cat(expected)
    others = torch.cat(theirs) - torch.cat(expected)
    assert ours.square().mean().sqrt() <= 1.1 * others.square().mean().sqrt()
    assert ours.abs().max() <= 1.5 * others.abs().max()
    assert others.square().mean().sqrt() < 0.1, "the reference is the same model"


@pytest.mark.parametrize("about", [(), (an_image(70, 9, 11),)])
async def test_nothing_is_shared_between_salts(lab, about):
    """Neither prompts nor answers, generated or scored; within one all is. It changes no number."""
    first = prompt(words(70, 31), *about, words(70, 32))
    async with lab.engine() as engine:
        (answer,) = await ask(engine, generation(first, 40, salt=b"a" * 32))
        following = prompt(words(70, 31), *about, words(70, 32) + answer.tokens + words(9, 33))
        reused = {}
        for salt in (b"b" * 32, b"", b"a" * 32):
            (answer,) = await ask(engine, generation(following, 3, salt=salt))
            lab.check(following, answer)
            reused[salt] = answer.finish.timings.cached_tokens
        assert reused == {b"b" * 32: 0, b"": 0, b"a" * 32: len(first.token_ids) + 39}
        items = tuple(ScoreItem(prompt(words(70, 31), *about, words(70, 40 + n)), ((1,), (2, 3))) for n in range(3))
        for salt, before in ((b"c" * 32, False), (b"a" * 32, True)):
            scores = await engine.score(Scoring("s", items, salt=salt))
            lab.check_scores(items, scores)
            assert (scores.cached_tokens[0] >= 70) is (before and bool(about))  # question prefixes are their request's
