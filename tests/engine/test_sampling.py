"""Sampling is each answer's own: seeds repeat whatever runs beside it, stops cut, log-probabilities are the model's."""

from __future__ import annotations

import asyncio

import torch
from transformers import Qwen2VLForConditionalGeneration

from lm_service.engine.types import FinishReason
from tests.engine.lab import TOKENS, an_image, ask, generation, prompt, words

WANTED = prompt(words(9, 1), an_image(1, 6, 7), words(6, 2))
WARM = {"temperature": 1.3, "top_p": 0.9, "top_k": 40, "presence_penalty": 0.4, "repetition_penalty": 1.1}


async def test_seeded_answers_repeat_in_any_company(lab):
    async with lab.engine() as engine:
        (alone,) = await ask(engine, generation(WANTED, 12, seed=7, **WARM))
        others = [ask(engine, generation(prompt(words(5 + i, i)), 9, temperature=1.0, seed=i)) for i in range(20)]
        *_, (among,) = await asyncio.gather(*others, ask(engine, generation(WANTED, 12, seed=7, **WARM)))
        (other,) = await ask(engine, generation(WANTED, 12, seed=8, **WARM))
    assert alone.tokens == among.tokens
    assert alone.tokens != other.tokens


async def test_seeded_n_answers_differ_and_repeat(lab):
    async with lab.engine() as engine:
        first = await ask(engine, generation(WANTED, 8, n=4, temperature=1.5, seed=3))
        again = await ask(engine, generation(WANTED, 8, n=4, temperature=1.5, seed=3))
    assert [answer.tokens for answer in first] == [answer.tokens for answer in again]
    assert len({tuple(answer.tokens) for answer in first}) == 4


async def test_preemption_changes_no_draw(lab):
    """Stepping back and returning neither repeats nor skips a random number."""
    asked = [generation(prompt(words(10, i)), 25, temperature=1.0, seed=i, logprobs=None) for i in range(10)]
    async with lab.engine() as engine:
        expected = [(await ask(engine, one))[0].tokens for one in asked]
    async with lab.engine(kv_bytes=4 * 64 * 512, prefix_bytes=64 * 512, slab_tokens=64) as engine:
        answers = await asyncio.gather(*(ask(engine, one) for one in asked))
        assert engine.describe().preemptions > 0
    assert [answer.tokens for (answer,) in answers] == expected


async def test_stop_strings_and_end_tokens(lab):
    async with lab.engine() as engine:
        (whole,) = await ask(engine, generation(WANTED, 12))
        stop = whole.text[4:6]
        (stopped,) = await ask(engine, generation(WANTED, 12, stop=(stop,)))
        assert stopped.text == whole.text[: whole.text.index(stop)]
        assert stopped.finish.reason is FinishReason.STOP and stopped.finish.stop == stop
    end = whole.tokens[3]
    async with lab.engine(end_ids=frozenset([end])) as engine:
        (ended,) = await ask(engine, generation(WANTED, 12))
        assert ended.tokens == whole.tokens[: whole.tokens.index(end) + 1]
        assert ended.finish.reason is FinishReason.STOP and ended.finish.stop is None
        (ignored,) = await ask(engine, generation(WANTED, 12, ignore_eos=True))
        assert ignored.tokens == whole.tokens
    assert whole.text == "".join(TOKENS.text(token) for token in whole.tokens)


async def test_logprobs_are_of_the_model_not_of_the_temperature(lab):
    async with lab.engine() as engine:
        (answer,) = await ask(engine, generation(WANTED, 6, seed=1, logprobs=5, **WARM))
    rows = lab.logits(WANTED, answer.tokens).log_softmax(-1)[len(WANTED.token_ids) - 1 :]
    for row, token, given in zip(rows, answer.tokens, answer.logprobs, strict=False):
        assert given.token_id == token and abs(given.logprob - float(row[token])) < 2e-4
        torch.testing.assert_close(torch.tensor([v for _, v in given.top]), row.topk(5).values, atol=2e-4, rtol=0)


async def test_greedy_equals_the_whole_unsplit_model(lab, checkpoint_path):
    """transformers' Qwen2VLForConditionalGeneration with its own tower and its own generate, on real pixels."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint_path, dtype=torch.float32).eval()
    image = an_image(9, 5, 6)
    config = model.config
    pixels = torch.randn(4 * image.tokens, 1176, generator=torch.Generator().manual_seed(0))
    grid = torch.tensor([image.grid_thw])
    wanted = prompt(words(8, 1), image, words(7, 3))
    ids = torch.tensor([[*words(8, 1), *[config.image_token_id] * image.tokens, *words(7, 3)]])
    with torch.inference_mode():
        features = model.get_image_features(pixels, grid).pooler_output[0]
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == config.image_token_id).long(),
            pixel_values=pixels,
            image_grid_thw=grid,
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=-1,
        )
    async with lab.engine() as engine:
        lab.album.rows = lambda reference: features
        (answer,) = await ask(engine, generation(wanted, 24))
    assert answer.tokens == out[0, ids.shape[1] :].tolist()
