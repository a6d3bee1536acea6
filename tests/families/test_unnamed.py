"""Families that nobody named: every image-text-to-text class of transformers is served as its unsplit model answers,
or refused in words; some of them through REST, over restarts of every process."""

from __future__ import annotations

import json

import pytest

from tests.families.any_checkpoint import make_any
from tests.families.sweep import FAULT, NAMES, SWEPT, UNMADE, Outcome, outcome
from tests.families.unsplit_general import Unsplit
from tests.images import photograph
from tests.system.cluster import System, data_url, encoded, image_part, text_part

STORED = {each["model_type"]: Outcome(**each) for each in json.loads(SWEPT.read_text())}
AT_ONCE = ("aria",)
"""Experts that files have in parts; the others are for `make test-slow`."""
MADE = [name for name, each in STORED.items() if each.what != UNMADE]
IMAGE, OTHER = photograph("chelsea", (150, 100)), photograph("coffee", (64, 96))
CHOICES = ["yes", "no", "a cat"]


@pytest.mark.parametrize(
    "model_type", [name if name in AT_ONCE else pytest.param(name, marks=pytest.mark.slow) for name in MADE]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within processors of transformers
def test_what_becomes_of_it_is_what_is_stored(model_type, tmp_path, monkeypatch):
    assert outcome(model_type, tmp_path / model_type, monkeypatch) == STORED[model_type]


def test_every_class_was_tried_and_none_is_served_wrong():
    assert tuple(STORED) == NAMES
    assert not [each for each in STORED.values() if each.what == FAULT]


def turns_of(unsplit, system, turns):
    """A conversation's answer through REST, and the unsplit model's."""
    messages = [
        {
            "role": role,
            "content": [text_part(p) if isinstance(p, str) else image_part(data_url(encoded(p))) for p in parts],
        }
        for role, parts in turns
    ]
    said = system.chat(messages, max_tokens=8)["choices"][0]["message"]["content"]
    return said, unsplit.answer(turns, 8)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["aria", "llava_onevision", "paddleocr_vl"])
def test_rest_over_restarts_of_every_process(model_type, tmp_path, monkeypatch):
    path = make_any(model_type, tmp_path / "model")
    unsplit = Unsplit(path, monkeypatch)
    asked = [f"what is on this image? {number}" for number in range(10)]
    expected = [unsplit.answer([("user", [IMAGE, text])], 8) for text in asked]
    with System(path, tmp_path / "system") as system:
        image = system.upload(encoded(IMAGE))["id"]
        answers = system.ask(image, asked[:5], temperature=0, max_tokens=8)
        made = system.encodes()
        for process in (*system.visions, *system.languages, *system.gateways):
            process.restart()
        system.wait_whole()
        answers += system.ask(image, asked[5:], temperature=0, max_tokens=8)
        assert made + system.encodes() == 1
        assert [answer["text"] for answer in answers] == expected
        (weighed,) = system.ask(image, [{"text": asked[0], "choices": CHOICES}])
        assert weighed["choices"] == pytest.approx(unsplit.weighed(CHOICES, [("user", [IMAGE, asked[0]])]), abs=1e-4)
        several = [("user", [IMAGE, OTHER, asked[0]])]
        later = [("user", [IMAGE, asked[0]]), ("assistant", ["a cat"]), ("user", [OTHER, "and this?"])]
        for turns in (several, later):
            said, own = turns_of(unsplit, system, turns)
            assert said == own
