"""Gemma 3, whose images see themselves both ways, and PaliGemma, whose prompts do, answer as the unsplit class does."""

from __future__ import annotations

import asyncio
import json

import pytest
import torch

from lm_service.engine.packed.engine import PackedEngine
from lm_service.engine.packed.options import PackedOptions
from lm_service.engine.types import ScoreItem, Scoring
from lm_service.prompt import Message
from lookonce.core.errors import CheckpointError
from lookonce.models.checkpoint.check import check_checkpoint
from lookonce.models.general import limits
from lookonce.models.general.blocks import UnknownMask, visible
from lookonce.models.text_adapter import BothWays
from tests.cli.commands import invoke
from tests.engine.lab import ask, generation
from tests.families.models_page import No, Served
from tests.families.test_general import CHOICES, IMAGE, OTHER, QUESTION, Shelf, Split, check_packed, user
from tests.families.tiny_checkpoints import make_tiny
from tests.families.tiny_gemma import GEMMAS, WINDOW
from tests.families.unsplit_general import Unsplit
from tests.system.cluster import System, data_url, encoded, image_part, text_part

VIDEO = No("families/test_models_page.py::test_video_is_no_part_of_a_chat")
INT8 = No("families/test_general.py::test_int8_is_refused")
SERVED = (
    Served(
        "Gemma 3 4B, 12B, 27B",
        "gemma3",
        split="test_questions_over_rest",
        packed="test_many_at_once_are_as_each_alone",
        prefix="test_the_packed_engine_is_exact",
        scores="test_questions_over_rest",
        video=VIDEO,
        quantised=INT8,
    ),
    Served(
        "PaliGemma 3B, PaliGemma 2 3B, 10B, 28B",
        "paligemma",
        split="test_questions_over_rest",
        packed="test_many_at_once_are_as_each_alone",
        prefix=No("test_a_whole_prompt_is_reused_and_no_part_of_one"),
        scores="test_questions_over_rest",
        video=VIDEO,
        quantised=INT8,
    ),
)
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SLOW = pytest.mark.slow
TEXTS = ("why?", "how many\n\ncats are there?\n", "\nwhat is on this image?", "is a cat on this image? yes no " * 8)


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory):
    made = {}

    def of(family):
        if family not in made:
            made[family] = make_tiny(GEMMAS[family], tmp_path_factory.mktemp("gemmas") / family)
        return made[family]

    return of


def engine_of(split, **options):
    options = {"kv_bytes": 8 << 20, "prefix_bytes": 8 << 20, **options}
    return PackedEngine(split.model, split.template.table, frozenset(), PackedOptions(**options))


def prompt(split, reference, text):
    return split.prompts.build([Message("user", (reference, text))])


@pytest.mark.parametrize("family", ["gemma3", pytest.param("paligemma", marks=SLOW), "paligemma2"])
async def test_the_packed_engine_is_exact(family, checkpoint_of, monkeypatch):
    """In steps of 37 tokens, which end among an image's."""
    await check_packed(checkpoint_of(family), monkeypatch, prefix_reuse=family == "gemma3")


@pytest.mark.parametrize(
    "family", ["gemma3", *(pytest.param(name, marks=SLOW) for name in ("paligemma", "paligemma2"))]
)
async def test_many_at_once_are_as_each_alone(family, checkpoint_of):
    """32 questions, in steps of all of them and in steps that are shorter than an image."""
    split = Split(checkpoint_of(family))
    encoded = [split.encoded(image, number) for number, image in enumerate((IMAGE, OTHER))]
    prompts = [prompt(split, encoded[at % 2][0], f"{TEXTS[at % 4]} {at}") for at in range(32)]

    async def answers(together, **options):
        engine = engine_of(split, **options)
        await engine.start(Shelf(encoded))
        try:
            asked = [ask(engine, generation(each, 6)) for each in prompts]
            return await asyncio.gather(*asked) if together else [await each for each in asked]
        finally:
            await engine.close()

    alone = await answers(False)
    for packed in (await answers(True), await answers(True, step_tokens=5, burst_tokens=5)):
        for (one,), (other,) in zip(alone, packed, strict=True):
            assert one.tokens == other.tokens
            for mine, theirs in zip(one.logprobs, other.logprobs, strict=True):
                assert mine.logprob == pytest.approx(theirs.logprob, abs=2e-4)


@pytest.mark.parametrize("family", ["gemma3", "paligemma2"])
def test_newlines_beside_images_are_read_as_by_the_processor(family, checkpoint_of, patch):
    """The processor writes some around an image, and the tokenizer joins them with those of the text."""
    split, unsplit = Split(checkpoint_of(family)), Unsplit(checkpoint_of(family), patch)
    reference, _ = split.encoded(IMAGE, 1)
    for text in ("a\n\nb", "\nwhy?", "\n\n\nwhy?\n\n", "why?\n", "a \n\n b", "<b>\nwhy?"):
        expected = unsplit.inputs(user(IMAGE, text))["input_ids"][0].tolist()
        assert list(prompt(split, reference, text).token_ids) == expected


async def test_a_whole_prompt_is_reused_and_no_part_of_one(checkpoint_of):
    split = Split(checkpoint_of("paligemma2"))
    assert not split.model.shape.prefix_reuse
    encoded = [split.encoded(IMAGE, 1)]
    first, other = (prompt(split, encoded[0][0], text) for text in (QUESTION, QUESTION + " why?"))
    engine = engine_of(split)
    await engine.start(Shelf(encoded))
    try:
        found = [(await ask(engine, generation(each, 4)))[0] for each in (first, other, first)]
        timings = [answer.finish.timings for answer in found]
        assert [each.cached_tokens for each in timings] == [0, 0, len(first.token_ids) - 1]
        assert [each.prefix_hit for each in timings] == [False, False, True]
        assert found[0].tokens == found[2].tokens
        assert engine.describe().prefix_entries == 2  # no answer is kept for a turn that can't come
        await engine.forget([encoded[0][0].key], [])
        assert engine.describe().prefix_entries == 0
    finally:
        await engine.close()


@pytest.mark.parametrize("isolated", [False, True])
async def test_choices_are_causal_behind_a_prompt_that_is_not(isolated, checkpoint_of, monkeypatch):
    path = checkpoint_of("paligemma2")
    split, unsplit = Split(path), Unsplit(path, monkeypatch)
    encoded, choices = [split.encoded(IMAGE, 1)], ((5, 9, 11), (5, 9, 2, 8), (7,), (7, 6))
    items = [ScoreItem(prompt(split, encoded[0][0], text), choices) for text in TEXTS]
    engine = engine_of(split)
    await engine.start(Shelf(encoded))
    try:
        scored = await engine.score(Scoring("s", tuple(items), isolated=isolated))
    finally:
        await engine.close()
    for text, sums in zip(TEXTS, scored.logprobs, strict=True):
        for choice, given in zip(choices, sums, strict=True):
            told = unsplit.logprobs(user(IMAGE, text), list(choice))
            weight = sum(float(row[token]) for row, token in zip(told, choice, strict=False))
            assert given == pytest.approx(weight, abs=4e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3", "paligemma2"])
def test_questions_over_rest(family, checkpoint_of, patch, tmp_path):
    """Two processes of halves, restarted between questions: one encode."""
    checkpoint, halves = checkpoint_of(family), tmp_path / "halves"
    unsplit, reused = Unsplit(checkpoint, patch), family == "gemma3"
    done = invoke("split", checkpoint, halves)
    assert done.returncode == 0, done.stderr
    asked = [*TEXTS, {"text": QUESTION, "choices": CHOICES}]
    with System(halves, tmp_path) as system:
        image = system.upload(encoded(IMAGE))
        *texts, weighed = system.ask(image["id"], asked, temperature=0, max_tokens=12)
        assert [each["text"] for each in texts] == [unsplit.answer(user(IMAGE, text)) for text in TEXTS]
        assert weighed["choices"] == pytest.approx(unsplit.weighed(CHOICES, user(IMAGE, QUESTION)), abs=1e-4)
        assert texts[0]["usage"]["prompt_tokens"] == unsplit.inputs(user(IMAGE, TEXTS[0]))["input_ids"].shape[1]
        (again,) = system.ask(image["id"], ["a cat?"], temperature=0, max_tokens=12)
        assert again["text"] == unsplit.answer(user(IMAGE, "a cat?"))
        assert again["receipt"]["prefix"] == ("hit" if reused else "miss")
        if reused:
            check_turns(system, unsplit)
        before = system.encodes()
    with System(halves, tmp_path) as system:
        for number in range(10):
            (answer,) = system.ask(image["id"], [f"{QUESTION} {number}"], temperature=0, max_tokens=4)
            assert answer["text"] == unsplit.answer(user(IMAGE, f"{QUESTION} {number}"), 4)
        assert system.encodes() == 0 and before == (2 if reused else 1)


def check_turns(system, unsplit):
    """Several images and turns."""
    turns = [
        ("system", ["answer the question"]),
        ("user", ["what is on this image?", IMAGE, OTHER]),
        ("assistant", ["a cat"]),
        ("user", [OTHER, "\nand on this?"]),
    ]
    for count in (2, 4):
        messages = [{"role": role, "content": [part_of(part) for part in parts]} for role, parts in turns[:count]]
        reply = system.chat(messages, max_tokens=12)
        assert reply["choices"][0]["message"]["content"] == unsplit.answer(turns[:count])


def part_of(part):
    return text_part(part) if isinstance(part, str) else image_part(data_url(encoded(part)))


@pytest.mark.parametrize("family", ["gemma3", "paligemma2"])
def test_plan_and_doctor_know_it(family, checkpoint_of, tmp_path):
    done = invoke("doctor", "--model", checkpoint_of(family), "--data-dir", tmp_path, "--port", "0", "--json")
    found = {finding["check"]: finding for finding in json.loads(done.stdout)}
    assert found["checkpoint"]["status"] == "ok" and "whole, both halves" in found["checkpoint"]["detail"]
    done = invoke("plan", "--model", checkpoint_of(family), "--ram", "4", "--image", "150x100")
    assert done.returncode == 0 and " tokens (150x100)" in done.stdout, done.stdout + done.stderr


def test_the_rules_are_read_off_the_class(checkpoint_of):
    rules = {family: Split(checkpoint_of(family)).model.shape.rules for family in ("gemma3", "paligemma2")}
    assert rules["gemma3"].windows == (WINDOW, WINDOW, None, WINDOW)
    assert rules["gemma3"].both_ways is BothWays.IMAGES and rules["gemma3"].within_window
    assert rules["paligemma2"].windows == (8, None, 8, None) and rules["paligemma2"].softcap == 2.0
    assert rules["paligemma2"].both_ways is BothWays.PROMPT and not rules["paligemma2"].within_window


@pytest.mark.parametrize("told", [(None, True), (BothWays.PROMPT, True), (BothWays.IMAGES, False)])
def test_other_rules_than_the_classes_are_refused_at_start(told, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "blocks_of_class", lambda architecture: told)
    path = variant(tmp_path, {"bos_token_id": len(str(told))})
    with pytest.raises(CheckpointError, match="the packed step of the general path differs from the class's own"):
        Split(path)


def test_masks_that_no_rule_says_are_refused_by_name(tmp_path, monkeypatch):
    def odd(architecture):
        raise UnknownMask("who sees whom depends on the weather")

    monkeypatch.setattr(limits, "blocks_of_class", odd)
    told = check_checkpoint(str(variant(tmp_path, {"bos_token_id": 3}))).problems
    assert len(told) == 1 and "served by the general path: who sees whom depends on the weather" in told[0]


def variant(tmp_path, config):
    """A Gemma 3 with other settings."""
    path = make_tiny(GEMMAS["gemma3"], tmp_path / "model")
    stated = json.loads((path / "config.json").read_text()) | config
    (path / "config.json").write_text(json.dumps(stated))
    return path


def test_who_sees_whom():
    both = visible(5, 2, [(1, 3)], within_window=True).int().tolist()
    assert both == [[1, 0, 0, 0, 0], [1, 1, 1, 1, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    beyond = visible(5, 2, [(1, 3)], within_window=False)
    assert beyond[3].tolist() == [False, True, True, True, False]
    assert torch.equal(visible(3, None, (), within_window=True), torch.ones(3, 3).tril().bool())
