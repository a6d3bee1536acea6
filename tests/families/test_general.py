"""Checkpoints without a family of their own are served by the general path, and answer as their unsplit models do."""

from __future__ import annotations

import pytest

from tests.families.tiny_checkpoints import make
from tests.families.unsplit_general import Unsplit
from tests.images import photograph
from tests.system.cluster import System, data_url, encoded, image_part, text_part

IMAGE, OTHER = photograph("chelsea", (150, 100)), photograph("coffee", (64, 96))
QUESTION, CHOICES = "what is on this image?", ["yes", "no", "a cat"]
THROUGH_REST = "llava"


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make(THROUGH_REST, tmp_path_factory.mktemp("general") / THROUGH_REST)


@pytest.fixture(scope="module")
def unsplit(checkpoint, patch):
    return Unsplit(checkpoint, patch)


@pytest.fixture(scope="module")
def system(checkpoint, tmp_path_factory):
    with System(checkpoint, tmp_path_factory.mktemp("system")) as one:
        yield one


def user(*parts):
    return [("user", list(parts))]


def test_questions_and_choices_about_one_encode(system, unsplit):
    image = system.upload(encoded(IMAGE))
    asked = [QUESTION, "how many cats are there?", {"text": QUESTION, "choices": CHOICES}]
    first, second, weighed = system.ask(image["id"], asked, temperature=0, max_tokens=12)
    assert [first["text"], second["text"]] == [unsplit.answer(user(IMAGE, text)) for text in asked[:2]]
    assert weighed["choices"] == pytest.approx(unsplit.weighed(CHOICES, user(IMAGE, QUESTION)), abs=1e-4)
    assert first["usage"]["prompt_tokens"] == unsplit.inputs(user(IMAGE, QUESTION))["input_ids"].shape[1]
    (again,) = system.ask(image["id"], ["why?"], temperature=0, max_tokens=12)
    assert again["text"] == unsplit.answer(user(IMAGE, "why?")) and again["receipt"]["prefix"] == "hit"
    assert system.encodes() == 1


def test_several_images_and_turns(system, unsplit):
    turns = [
        ("system", ["answer the question"]),
        ("user", ["what is on this image?", IMAGE]),
        ("assistant", ["a cat"]),
        ("user", [OTHER, "and on this?"]),
    ]
    messages = [
        {
            "role": role,
            "content": [
                text_part(part) if isinstance(part, str) else image_part(data_url(encoded(part))) for part in parts
            ],
        }
        for role, parts in turns
    ]
    reply = system.chat(messages, max_tokens=12)
    assert reply["choices"][0]["message"]["content"] == unsplit.answer(turns)
