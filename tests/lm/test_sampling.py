"""Sampling against the reference formulas: transformers' own logits processors, and plain arithmetic."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lm_service.engine import sampling as module
from lm_service.engine.sampling import SamplerState, apply_penalties, filter_logits, finite_rows, sample, token_logprobs
from lm_service.engine.types import Sampling

VOCABULARY = 64


def rows(seed, count=1):
    return torch.randn(count, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def state(seen=(), index=0, prompt=(), **sampling):
    made = SamplerState(Sampling(max_tokens=9, **sampling), prompt, index)
    for token in seen:
        made.append(token)
    return made


def distribution(logits, draws=4000, **sampling):
    """What `sample` draws, as shares."""
    one = state(seed=3, **sampling)
    counts = Counter(token for _ in range(draws // 50) for token in sample(logits.expand(50, -1), [one] * 50))
    return torch.tensor([counts[token] / draws for token in range(VOCABULARY)])


def test_greedy_takes_the_best_of_each_row():
    logits = rows(1, 5)
    assert sample(logits, [state() for _ in range(5)]) == logits.argmax(-1).tolist()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 70), st.floats(0.05, 1.0), st.floats(0.0, 0.9))
def test_filters_equal_transformers(seed, top_k, top_p, min_p):
    logits = rows(seed)
    expected = logits
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    if min_p > 0:
        expected = MinPLogitsWarper(min_p)(None, expected)
    descending, order = logits.double().sort(dim=-1, descending=True)
    kept = filter_logits(
        descending, torch.tensor([top_k]), torch.tensor([top_p]).double(), torch.tensor([min_p]).double()
    )
    mine = set(order[kept.isfinite()].tolist())
    theirs = set(expected[0].isfinite().nonzero().flatten().tolist())
    assert mine == theirs


@pytest.mark.parametrize(("top_p", "left"), [(0.0, 1), (0.25, 1), (0.5, 2), (0.75, 3), (1.0, 4)])
def test_top_p_keeps_the_fewest_tokens_that_reach_it_and_always_one(top_p, left):
    none = torch.tensor([0]), torch.tensor([top_p]).double(), torch.tensor([0.0]).double()
    assert int(filter_logits(torch.zeros(1, 4).double(), *none).isfinite().sum()) == left


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.2, 3.0), st.lists(st.integers(0, 63), min_size=1, max_size=12))
def test_repetition_penalty_equals_transformers(seed, penalty, tokens):
    logits = rows(seed)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([tokens]), logits.clone())
    half = len(tokens) // 2
    one = state(seen=tokens[half:], prompt=tokens[:half], repetition_penalty=penalty)
    torch.testing.assert_close(apply_penalties(logits, [one]), expected)


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_least_tokens_equal_transformers(penalty):
    """Also among rows that may end, and whatever else changes the logits; those that are told stay the model's own."""
    prompt, ends, logits = (3, 5, 8), [4, 7], rows(11, 2)
    logits[:, ends] += 20  # the best by far
    short = SamplerState(Sampling(9, min_tokens=2, repetition_penalty=penalty), prompt, end_ids=ends)
    free = SamplerState(Sampling(9), prompt, end_ids=ends)
    processor = MinNewTokensLengthLogitsProcessor(len(prompt), 2, ends, device="cpu")
    repetition = RepetitionPenaltyLogitsProcessor(penalty)
    ids, before = list(prompt), logits.clone()
    for _ in range(4):
        expected = processor(torch.tensor([ids]), repetition(torch.tensor([ids]), logits[:1].clone())).argmax().item()
        token, other = sample(logits, [short, free])
        assert token == expected and other in ends
        assert (token in ends) is (len(ids) >= len(prompt) + 2)
        ids.append(token)
        short.append(token)
    assert torch.equal(logits, before)


def test_presence_and_frequency_count_the_answer_only():
    logits = rows(2)
    one = state(seen=[5, 5, 5, 9], prompt=[7], presence_penalty=0.5, frequency_penalty=0.25)
    expected = logits.clone()
    expected[0, 5] -= 0.5 + 3 * 0.25
    expected[0, 9] -= 0.5 + 0.25
    torch.testing.assert_close(apply_penalties(logits, [one]), expected)


@pytest.mark.parametrize(
    "sampling", [{}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 20, "top_p": 0.9, "min_p": 0.05}]
)
def test_draws_follow_the_distribution(sampling):
    logits = rows(4)
    expected = TemperatureLogitsWarper(1.5)(None, logits)
    for name, warper in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper)):
        if name in sampling:
            expected = warper(sampling[name])(None, expected)
    shares = distribution(logits, temperature=1.5, **sampling)
    wanted = expected[0].softmax(-1)
    assert (shares[wanted == 0] == 0).all()
    assert (shares - wanted).abs().sum() / 2 < 0.06  # total variation of 4000 draws: 0.04 or so


def test_a_row_is_drawn_alike_alone_and_among_others():
    logits = rows(5, 6)
    kinds = [{}, {"temperature": 0.8}, {"temperature": 1.0, "top_p": 0.5}, {"temperature": 2.0, "top_k": 3}]
    kinds += [
        {"temperature": 1.0, "min_p": 0.1, "repetition_penalty": 1.3},
        {"temperature": 1.0, "frequency_penalty": 1.0},
    ]
    together = sample(logits, [state(seed=11, **kind) for kind in kinds])
    alone = [sample(logits[i : i + 1], [state(seed=11, **kind)])[0] for i, kind in enumerate(kinds)]
    assert together == alone


def test_seeds_repeat_and_answers_differ():
    logits = rows(6).expand(1, -1) * 0.1

    def run(index, seed):
        one = state(index=index, temperature=1.0, seed=seed)
        return [sample(logits, [one])[0] for _ in range(12)]

    assert run(0, 1) == run(0, 1)
    assert run(1, 1) == run(1, 1)
    assert len({tuple(run(index, 1)) for index in range(4)}) == 4
    assert run(0, 2**64 - 1) != run(0, 2)
    assert run(0, None) != run(0, None)


def test_a_very_low_temperature_is_greedy_not_nan():
    logits = rows(7)
    for sampling in ({}, {"top_p": 0.9}):
        assert sample(logits, [state(temperature=1e-30, seed=1, **sampling)]) == [int(logits.argmax())]


def test_logprobs_are_of_the_models_own_distribution():
    logits = rows(8, 2)
    told = token_logprobs(logits, [3, 4], [state(temperature=2.0, top_k=1, logprobs=5), state()])
    expected = logits[0].log_softmax(-1)
    assert told[1] is None
    assert told[0].logprob == pytest.approx(float(expected[3]))
    assert [token for token, _ in told[0].top] == expected.topk(5).indices.tolist()
    assert [value for _, value in told[0].top] == pytest.approx(expected.topk(5).values.tolist())


def test_zero_alternatives_still_tell_the_tokens_own():
    (told,) = token_logprobs(rows(8), [3], [state(logprobs=0)])
    assert told.top == ()


def test_rows_that_are_not_finite_are_found():
    logits = rows(9, 4)
    logits[1, 3], logits[2, 0], logits[3, 1] = float("nan"), float("inf"), float("-inf")
    assert finite_rows(logits) == [True, False, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.02, 1.0, 6.0])
def test_a_large_vocabulary_is_not_sorted_and_draws_the_same(dtype, spread, monkeypatch):
    """Also where many logits are equal, and where the filters leave more tokens than are looked at first."""
    kinds = [{"top_k": 40}, {"top_p": 0.6}, {"top_p": 0.99}, {"min_p": 0.05}, {"top_k": 3000, "top_p": 0.9}]
    kinds += [{"top_k": 1024}, {"top_p": 0.9, "min_p": 0.3, "top_k": 7}]
    logits = (torch.randn(len(kinds), 5000, generator=torch.Generator().manual_seed(7)) * spread).to(dtype)

    def drawn():
        states = [state(seed=seed, temperature=1.3, **kind) for seed, kind in enumerate(kinds)]
        return [sample(logits, states) for _ in range(40)]

    mine = drawn()
    monkeypatch.setattr(module, "_CANDIDATES", 5000)
    assert drawn() == mine
