"""/v1/systemone, as its clients ask: JSON and forms, images by name, the three types of questions."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from tests.gateway.conftest import Services

ImageFile = Callable[..., bytes]
PATH = "/v1/systemone"
QUESTIONS: dict[str, Any] = {
    "open": {"type": "noul", "instructions": "Is it open?", "criteria": {"true": "ajar counts", "false": None}},
    "colour": {
        "type": "choice",
        "instructions": {"task": "Which?"},
        "criteria": {"red": "like blood", "dark blue": None},
    },
    "wear": {"type": "score", "criteria": ["like new", {"is": "used"}, "worn"]},
}


def asked(http: httpx2.Client, **fields: Any) -> dict[str, Any]:
    reply = http.post(PATH, json={"model": "jev-latest", "questions": QUESTIONS, **fields})
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def test_answers_by_type(http: httpx2.Client) -> None:
    found = asked(http, state={"text": "a door"}, options={"return_logits": True, "temperature_scaling": False})
    answers = found["answers"]
    assert 0 <= answers["open"]["noul"] <= 1 and answers["open"]["type"] == "noul"
    colour = answers["colour"]
    assert set(colour["probabilities"]) == {"red", "dark blue"} == set(colour["logits"])
    assert colour["confidence"] == max(colour["probabilities"].values()) == colour["probabilities"][colour["choice"]]
    wear = answers["wear"]
    assert wear["legend"] == {"0": "like new", "1": {"is": "used"}, "2": "worn"}
    expected = sum(int(level) * share for level, share in wear["probabilities"].items())
    assert wear["score"] == pytest.approx(expected) and sum(wear["probabilities"].values()) == pytest.approx(1)
    assert found["usage"]["input_tokens"] > 50 and found["model"] == "tiny-vl"


def test_images_by_name_in_json_and_in_forms(http: httpx2.Client, services: Services, image_file: ImageFile) -> None:
    data = image_file()
    inline = {"pic-1": {"type": "image", "format": "png", "data_base64": base64.b64encode(data).decode()}}
    before = services.encodes()
    alone = asked(http, state="Look: pic-1 there.", assets=inline)
    assert services.encodes() == before + 1 and alone["receipt"]["embedding"] in ("miss", "hit")
    body = {
        "questions": QUESTIONS,
        "state": "Look: pic-1 there.",
        "assets": {"pic-1": {"type": "image", "part": "asset-0"}},
    }
    form = {"request": (None, json.dumps(body), "application/json"), "asset-0": ("asset-0", data, "image/png")}
    reply = http.post(PATH, files=form)
    assert reply.status_code == 200, reply.text
    assert reply.json()["answers"] == alone["answers"] and services.encodes() == before + 1
    loose = asked(http, state="Look.", assets=inline)
    without = asked(http, state="Look.")
    assert loose["answers"] != without["answers"]
    assert loose["usage"]["input_tokens"] > without["usage"]["input_tokens"]


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"questions": {"q": {"type": "box"}}}, "questions.q.type", "boxes"),
        ({"questions": {}}, "questions", "at least 1"),
        ({"assets": {"a": {"part": "x"}}}, "assets.a.part", "no part"),
        ({"assets": {"a": {}}}, "assets.a", "data_base64"),
        ({"assets": {"a": {"data_base64": "bm8="}}}, "assets.a", "image"),
        ({"options": {"assistant_prefix": "x"}}, "options.assistant_prefix", "not supported"),
    ],
)
def test_errors_name_the_field(http: httpx2.Client, fields: dict[str, Any], param: str, said: str) -> None:
    reply = http.post(PATH, json={"state": "a door", "questions": QUESTIONS, **fields})
    error = reply.json()["error"]
    assert reply.status_code in (400, 422) and error["param"] == param and said in error["message"], error
