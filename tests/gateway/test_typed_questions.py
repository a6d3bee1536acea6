"""Questions of closed types: probabilities of everything that could be answered, alike alone and among others."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from tests.gateway.conftest import Services

ImageFile = Callable[..., bytes]
COLOURS = ["red", "green", "dark blue"]
TYPED: list[dict[str, Any]] = [
    {"id": "choice", "text": "Which colour?", "choices": COLOURS},
    {"id": "told", "text": "Which colour?", "type": "choice", "choices": COLOURS, "tell_options": True},
    {"id": "orders", "text": "Which colour?", "choices": COLOURS, "debias": True},
    {"id": "yes", "text": "Is it open?", "type": "yes_no"},
    {"id": "both", "text": "Is it open?", "type": "yes_no", "debias": True},
    {"id": "rated", "text": "How good is it?", "scale": ["poor", "fair", "very good"]},
    {"id": "numbers", "text": "How good is it?", "scale": {"min": 0, "max": 10}},
    {"id": "tags", "text": "Is there a {label}?", "labels": ["door", "cat", "tree"]},
    {"id": "lines", "text": "Is this there?", "type": "many_of", "labels": ["door"]},
    {"id": "fields", "text": "Fill in.", "schema": {"type": "object", "properties": {"open": {"type": "boolean"}}}},
    {"id": "text", "text": "Describe."},
]


@pytest.fixture
def image(http: httpx2.Client, image_file: ImageFile) -> str:
    return http.post("/v1/images", files={"file": image_file()}).json()["id"]


def ask(http: httpx2.Client, image: str, *questions: dict[str, Any]) -> dict[str, dict[str, Any]]:
    reply = http.post(f"/v1/images/{image}/questions", json={"questions": list(questions), "max_tokens": 40})
    assert reply.status_code == 200, reply.text
    return {answer["id"]: answer for answer in reply.json()["answers"]}


def test_all_types_at_once_equal_each_alone(http: httpx2.Client, services: Services, image: str) -> None:
    before = services.encodes()
    together = ask(http, image, *TYPED)
    assert services.encodes() == before
    for question in TYPED:
        (alone,) = ask(http, image, question).values()
        mine = together[question["id"]]
        for name in ("choices", "labels"):
            assert mine.get(name) == pytest.approx(alone.get(name), abs=1e-4), question
        assert mine.get("type") == alone.get("type") and mine["text"] == alone["text"]


def test_what_each_type_says(http: httpx2.Client, image: str) -> None:
    found = ask(http, image, *TYPED)
    for name in ("choice", "told", "orders", "yes", "both", "rated", "numbers"):
        assert sum(found[name]["choices"].values()) == pytest.approx(1)
    assert set(found["choice"]["choices"]) == set(COLOURS) == set(found["choice"]["logprobs"])
    assert found["told"]["choices"] != found["choice"]["choices"]
    assert (found["orders"]["prompts"], found["both"]["prompts"], found["tags"]["prompts"]) == (3, 2, 3)
    assert "prompts" not in found["choice"]
    yes = found["yes"]
    assert yes["value"] is (yes["probability"] >= 0.5) and yes["choices"]["yes"] == yes["probability"]
    rated = found["rated"]
    expected = sum(place * rated["choices"][label] for place, label in enumerate(["poor", "fair", "very good"], 1))
    assert rated["value"] == pytest.approx(expected) and 1 <= rated["value"] <= 3
    assert set(found["numbers"]["choices"]) == {str(number) for number in range(11)}
    assert 0 <= found["numbers"]["value"] <= 10
    assert set(found["tags"]["labels"]) == {"door", "cat", "tree"}
    assert found["tags"]["value"] == [label for label, share in found["tags"]["labels"].items() if share >= 0.5]
    assert set(found["fields"]["value"]) <= {"open"} and found["fields"]["type"] == "extract"
    assert "type" not in found["text"] and all(math.isfinite(share) for share in found["tags"]["labels"].values())


def test_orders_are_averaged(http: httpx2.Client, image: str) -> None:
    """As by asking each order by hand."""
    orders = [COLOURS[at:] + COLOURS[:at] for at in range(3)]
    texts = [f"Which colour?\nAnswer with one of: {', '.join(order)}." for order in orders]
    by_hand = ask(http, image, *({"id": str(at), "text": text, "choices": COLOURS} for at, text in enumerate(texts)))
    (averaged,) = ask(http, image, TYPED[2]).values()
    for colour in COLOURS:
        mean = sum(answer["choices"][colour] for answer in by_hand.values()) / 3
        assert averaged["choices"][colour] == pytest.approx(mean, abs=1e-5)


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"type": "choice"}, "questions.0.choices", "required"),
        ({"type": "rating"}, "questions.0.scale", "required"),
        ({"type": "many_of"}, "questions.0.labels", "required"),
        ({"type": "extract"}, "questions.0.schema", "required"),
        ({"type": "yes_no", "choices": ["a"]}, "questions.0.choices", "does not belong"),
        ({"choices": ["a"], "labels": ["b"]}, "questions.0.labels", "one of these ways"),
        ({"labels": ["a", "a"]}, "questions.0.labels", "repeat"),
        ({"scale": ["a"]}, "questions.0.scale", "at least 2"),
        ({"scale": {"min": 3, "max": 3}}, "questions.0.scale", "more than"),
        ({"labels": ["a"], "debias": True}, "questions.0.debias", "no meaning"),
        ({"type": "box"}, "questions.0.type", "one of"),
    ],
)
def test_errors_name_the_field(http: httpx2.Client, image: str, fields: dict[str, Any], param: str, said: str) -> None:
    reply = http.post(f"/v1/images/{image}/questions", json={"questions": [{"text": "?", **fields}]})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, param) and said in error["message"], error


def test_too_many_prompts_are_refused(http: httpx2.Client, image: str) -> None:
    labels = [f"label {number}" for number in range(64)]
    questions = [{"text": f"{number}?", "labels": labels} for number in range(17)]
    error = http.post(f"/v1/images/{image}/questions", json={"questions": questions}).json()["error"]
    assert error["param"] == "questions" and "1024" in error["message"]
