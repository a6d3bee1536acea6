"""A step's layers as one program of kernels: the bits of kernels called one by one, on any number of threads."""

from __future__ import annotations

import pytest
import torch

from lm_service.engine.packed.execution import kernel_attention
from lm_service.engine.types import ScoreItem, Scoring
from lookonce.models.kernels import text_layers as layers
from tests.engine.lab import an_image, ask, generation, prompt, words

CHOICES = ((5,), (6, 7), (6, 8, 9))
ITEMS = tuple(
    ScoreItem(prompt(words(9, 1), an_image(i % 2, 7 + i % 2, 9), words(2 + i, 50 + i)), CHOICES) for i in range(11)
)


async def results(lab, **options):
    """Scores and an answer."""
    async with lab.engine(**options) as engine:
        scores = await engine.score(Scoring("s", ITEMS))
        (answer,) = await ask(engine, generation(prompt(words(9, 1), an_image(5, 4, 4), words(30, 7)), 6))
        return scores.logprobs, answer.tokens, [token.logprob for token in answer.logprobs]


@pytest.mark.parametrize("options", [{}, {"step_tokens": 5, "burst_tokens": 7}], ids=["whole steps", "small steps"])
@pytest.mark.parametrize("splits", [False, True])
async def test_the_same_bits_as_one_by_one(lab, options, splits, monkeypatch):
    if splits:
        monkeypatch.setattr(kernel_attention, "_ROOM", 1)
    program = await results(lab, **options)
    compiled, lab.adapter._compiled = lab.adapter._compiled, None
    try:
        assert compiled is not None
        assert await results(lab, **options) == program
    finally:
        lab.adapter._compiled = compiled


async def test_the_same_bits_on_any_number_of_threads(lab, monkeypatch):
    monkeypatch.setattr(layers, "_SINGLE_THREADED", 0)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(await results(lab))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]
