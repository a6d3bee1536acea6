"""What a request wants of single tokens: biases, allowed tokens, bad words, tokens that end an answer."""

from __future__ import annotations

import pytest
import torch

from lm_service.engine.sampling import SamplerState, sample
from lm_service.engine.types import FinishReason, Sampling
from lookonce.core.errors import ErrorKind, LookonceError
from tests.engine.lab import TOKENS, ask, generation, prompt, words

WANTED = prompt(words(9, 1))


async def greedy(lab, tokens=8, **sampling):
    async with lab.engine() as engine:
        (answer,) = await ask(engine, generation(WANTED, tokens, **sampling))
    return answer


async def test_a_bias_decides_and_log_probabilities_stay_the_models(lab):
    free = await greedy(lab)
    forced = await greedy(lab, bias=((7, 100.0),))
    assert forced.tokens == [7] * 8 != free.tokens
    logits = lab.logits(WANTED, forced.tokens).log_softmax(-1)[len(WANTED.token_ids) - 1 : -1]
    for row, said in zip(logits, forced.logprobs, strict=True):
        assert said.logprob == pytest.approx(float(row[7]), abs=2e-4)
    without = await greedy(lab, bias=((free.tokens[0], -100.0),))
    assert without.tokens[0] != free.tokens[0]


async def test_only_allowed_tokens_are_drawn(lab):
    for temperature in (0.0, 1.5):
        answer = await greedy(lab, 30, allowed=(3, 5, 9), temperature=temperature, seed=4)
        assert set(answer.tokens) <= {3, 5, 9}


async def test_a_bad_word_is_never_completed(lab):
    free = await greedy(lab, 12)
    word = tuple(free.tokens[2:5])
    answer = await greedy(lab, 12, bad_words=(word,))
    assert answer.tokens[:4] == free.tokens[:4] and answer.tokens[4] != word[-1]
    text = tuple(answer.tokens)
    assert not any(text[at : at + 3] == word for at in range(len(text)))
    (single,) = {free.tokens[0]}
    assert single not in (await greedy(lab, 12, bad_words=((single,),))).tokens


async def test_a_stop_token_ends_an_answer_also_with_ignore_eos_and_not_too_early(lab):
    free = await greedy(lab, 12)
    stop = free.tokens[3]
    for ignore in (False, True):
        answer = await greedy(lab, 12, stop_ids=(stop,), ignore_eos=ignore)
        assert answer.tokens == free.tokens[: free.tokens.index(stop) + 1]
        assert answer.finish.reason is FinishReason.STOP
        assert answer.text == "".join(map(TOKENS.text, answer.tokens[:-1]))
    late = await greedy(lab, 12, stop_ids=(stop,), min_tokens=8)
    assert stop not in late.tokens[:8]


@pytest.mark.parametrize("field", ["bias", "allowed", "stop_ids"])
async def test_a_token_outside_the_vocabulary_is_refused_by_the_fields_name(lab, field):
    value = ((600, 1.0),) if field == "bias" else (600,)
    with pytest.raises(LookonceError) as caught:
        await greedy(lab, **{field: value})
    assert caught.value.kind is ErrorKind.INVALID_ARGUMENT
    assert caught.value.param == {"bias": "logit_bias", "allowed": "allowed_token_ids"}.get(field, "stop_token_ids")


def test_what_is_allowed_stays_where_bad_words_would_leave_nothing():
    wanted = Sampling(9, allowed=(3, 5), bad_words=((3,), (5,)))
    logits = torch.zeros(1, 16)
    logits[0, 5] = 1.0
    assert sample(logits, [SamplerState(wanted, ())]) == [5]
    assert sample(logits, [SamplerState(Sampling(9, allowed=(3, 5), bad_words=((5,),)), ())]) == [3]


def test_a_row_is_steered_by_its_own_request_only():
    logits = torch.randn(3, 16)
    states = [SamplerState(Sampling(9), ()), SamplerState(Sampling(9, allowed=(2,)), ()), SamplerState(Sampling(9), ())]
    best = logits.argmax(-1).tolist()
    assert sample(logits, states) == [best[0], 2, best[2]]
