"""Sliding windows in the packed engine: long prompts, shared and cut prefixes, choices and turns are answered as by
transformers alone, whatever window its layers have."""

from __future__ import annotations

import asyncio
import json

import pytest

from lm_service.engine.packed.engine import PackedEngine
from lm_service.engine.packed.options import PackedOptions
from lm_service.engine.types import ScoreItem, Scoring
from lm_service.prompt import Message
from tests.engine.lab import ask, generation
from tests.families.test_general import IMAGE, OTHER, Shelf, Split
from tests.families.tiny_checkpoints import make
from tests.families.unsplit_general import Unsplit

LONG = "is a cat on this image? yes no why? how many cats are there? " * 12
WORDS = ("why?", "how many cats are there?", LONG, LONG + "why?", "what is this? " + LONG)


def windowed(path, window):
    """A Mistral Small whose layers have a window; their config.json says the context is 2048."""
    config = json.loads((make("mistral3", path) / "config.json").read_text())
    config["text_config"]["sliding_window"] = window
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module", params=[16, pytest.param(3, marks=pytest.mark.slow)])
def both(request, tmp_path_factory, patch):
    path = windowed(tmp_path_factory.mktemp("windows") / "model", request.param)
    return Unsplit(path, patch), Split(path)


@pytest.mark.parametrize(("window", "expected"), [(64, 64), (1536, 1536), (2048, None), (4096, None)])
def test_a_window_leaves_the_context_as_it_is(window, expected, tmp_path):
    shape = Split(windowed(tmp_path / "model", window)).model.shape
    assert shape.context == 2048
    assert (shape.rules.windows[0] if shape.rules else None) == expected


def turns_of(texts, images=(IMAGE,)):
    turns = [("user", [*images, texts[0]])]
    for number, text in enumerate(texts[1:]):
        turns.append(("assistant" if number % 2 == 0 else "user", [text]))
    return turns


def prompt_of(split, turns, references):
    parts = [
        Message(role, tuple(references[id(part)] if not isinstance(part, str) else part for part in parts))
        for role, parts in turns
    ]
    return split.prompts.build(parts)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"step_tokens": 23, "burst_tokens": 23, "long_suffix_tokens": 40},
        {"slab_tokens": 1024, "kv_bytes": 3 << 20, "max_running": 6},  # some step back
    ],
)
async def test_answers_are_the_unsplit_models(options, both):
    unsplit, split = both
    encoded = [split.encoded(image, number) for number, image in enumerate((IMAGE, OTHER))]
    references = {id(image): reference for image, (reference, _) in zip((IMAGE, OTHER), encoded, strict=True)}
    options = {"kv_bytes": 16 << 20, "prefix_bytes": 16 << 20, **options}
    engine = PackedEngine(split.model, split.template.table, frozenset(), PackedOptions(**options))
    await engine.start(Shelf(encoded))
    try:
        conversations = [turns_of([text]) for text in WORDS]
        conversations.append(turns_of(["why?", "a cat", LONG], (IMAGE, OTHER)))
        conversations.append(turns_of([LONG, "a cat", "yes", "no", "why?"]))
        for _ in range(2):
            asked = [ask(engine, generation(prompt_of(split, turns, references), 24)) for turns in conversations]
            for turns, (answer,) in zip(conversations, await asyncio.gather(*asked), strict=True):
                check(unsplit, turns, answer)
        assert engine.describe().prefix_hits
    finally:
        await engine.close()


def check(unsplit, turns, answer):
    expected = unsplit.logprobs(turns, answer.tokens)[:-1]
    for row, token, given in zip(expected, answer.tokens, answer.logprobs, strict=True):
        assert token == int(row.argmax())
        assert given.logprob == pytest.approx(float(row[token]), abs=2e-4)


@pytest.mark.parametrize("isolated", [False, True])
async def test_choices_longer_than_the_window_are_scored(isolated, both):
    unsplit, split = both
    encoded = [split.encoded(IMAGE, 0)]
    begin = tuple(range(300, 318))
    choices = ((*begin, 7, 9), (*begin, 7, 11, 12), (5,), begin[:4], (*range(320, 340),))
    references = {id(IMAGE): encoded[0][0]}
    items = [ScoreItem(prompt_of(split, turns_of([text]), references), choices) for text in (*WORDS[:3], "why? why?")]
    options = PackedOptions(kv_bytes=16 << 20, prefix_bytes=16 << 20, question_prefix_tokens=1)
    engine = PackedEngine(split.model, split.template.table, frozenset(), options)
    await engine.start(Shelf(encoded))
    try:
        scored = await engine.score(Scoring("s", tuple(items), isolated=isolated))
    finally:
        await engine.close()
    for text, sums in zip((*WORDS[:3], "why? why?"), scored.logprobs, strict=True):
        for choice, given in zip(choices, sums, strict=True):
            rows = unsplit.logprobs(turns_of([text]), list(choice))
            weight = sum(float(row[token]) for row, token in zip(rows, choice, strict=False))
            assert given == pytest.approx(weight, abs=1e-3)
