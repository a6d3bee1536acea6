"""Many questions on one image in one call."""

from __future__ import annotations

import json
from collections.abc import Callable

import httpx2
import pytest

from tests.gateway.conftest import Services

ImageFile = Callable[..., bytes]


@pytest.fixture
def image(http: httpx2.Client, image_file: ImageFile) -> str:
    return http.post("/v1/images", files={"file": image_file()}).json()["id"]


def test_ten_questions_one_encode_order_kept(http: httpx2.Client, services: Services, image: str) -> None:
    before = services.encodes()
    questions = [
        {"id": f"q{number}", "text": f"Question {number}?", "max_tokens": 1 + number % 3} for number in range(10)
    ]
    answers = http.post(f"/v1/images/{image}/questions", json={"questions": questions}).json()["answers"]
    assert [answer["id"] for answer in answers] == [f"q{number}" for number in range(10)]
    assert all(answer["usage"]["completion_tokens"] <= 1 + n % 3 for n, answer in enumerate(answers))
    assert all(answer["receipt"]["embedding"] == "hit" and answer["finish_reason"] for answer in answers)
    assert services.encodes() == before


def test_choices_get_probabilities_beside_open_answers(http: httpx2.Client, image: str) -> None:
    body = {
        "questions": ["Describe.", {"id": "w", "text": "Is it day?", "choices": ["yes", "no"]}],
        "max_tokens": 2,
        "system": "Be brief.",
    }
    open_one, chosen = http.post(f"/v1/images/{image}/questions", json=body).json()["answers"]
    assert open_one["id"] == "0" and "choices" not in open_one
    assert set(chosen["choices"]) == {"yes", "no"} and sum(chosen["choices"].values()) == pytest.approx(1)
    assert chosen["text"] == max(chosen["choices"], key=chosen["choices"].get)


def test_special_tokens_are_let_through_on_request_alone(http: httpx2.Client, image: str) -> None:
    text = "Is <|object_ref_start|>the cat<|object_ref_end|> here?"
    drawn = {"max_tokens": 100, "ignore_eos": True, "temperature": 2.0, "seed": 7}
    questions = [{"id": "open", "text": text, **drawn}, {"id": "weighed", "text": text, "choices": ["yes", "no"]}]
    path, tokens = f"/v1/images/{image}/questions", []
    for own, whole in ((None, None), (None, True), (True, False), (False, None), (None, False), (False, True)):
        body = {"questions": [item | {"skip_special_tokens": own} for item in questions], "skip_special_tokens": whole}
        opened, weighed = http.post(path, json=body).json()["answers"]
        let_through = own is False or (own is None and whole is False)
        assert ("<|" in opened["text"]) == let_through
        tokens.append((let_through, opened["usage"]["prompt_tokens"], weighed["usage"]["prompt_tokens"]))
    assert len(set(tokens)) == 2 and {one[0] for one in tokens} == {True, False}
    told, apart = min(tokens), max(tokens)
    assert told[1] == told[2] > apart[1] == apart[2]


def test_a_question_that_fails_fails_alone(http: httpx2.Client, image: str) -> None:
    body = {"questions": ["short?", {"id": "long", "text": "word " * 40_000}], "max_tokens": 1}
    good, bad = http.post(f"/v1/images/{image}/questions", json=body).json()["answers"]
    assert "text" in good
    assert bad["id"] == "long" and bad["error"]["code"] == "context_length_exceeded"


def test_stream_yields_every_answer_and_ends(http: httpx2.Client, image: str) -> None:
    body = {"questions": [f"{n}?" for n in range(5)], "max_tokens": 2, "stream": True}
    with http.stream("POST", f"/v1/images/{image}/questions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert events[-1] == "[DONE]"
    assert sorted(json.loads(event)["id"] for event in events[:-1]) == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"questions": []}, "questions"),
        ({"questions": [""]}, "questions.0"),
        ({"questions": [3]}, "questions.0"),
        ({"questions": ["a"], "n": 2}, "n"),
        ({"questions": ["a"], "stop": {"a": 1}}, "stop"),
        ({"questions": ["a"] * 1001}, "questions"),
        ({"questions": ["a", {"text": "b", "colour": 1}]}, "questions.1.colour"),
        ({"questions": [{"text": "b", "choices": ["x", "x"]}]}, "questions.0.choices"),
        ({"questions": [{"text": "b", "choices": ["x"] * 65}]}, "questions.0.choices"),
        ({"questions": [{"id": "a", "text": "b"}, {"id": "a", "text": "c"}]}, "questions"),
        ({"questions": [{"text": "b", "temperature": -1}]}, "questions.0.temperature"),
        ({"questions": ["a"], "embedding": "x"}, "embedding"),
        ({"questions": ["a"] * 1000, "system": "x" * 1000}, "questions"),
    ],
)
def test_bad_requests_name_the_field(http: httpx2.Client, image: str, body: dict, param: str) -> None:
    response = http.post(f"/v1/images/{image}/questions", json=body)
    assert response.status_code == 400 and response.json()["error"]["param"] == param, response.text


def test_a_text_beyond_the_context_is_its_questions_trouble_alone(http: httpx2.Client, image: str) -> None:
    long = "word " * 150_000
    asked = ["Fine?", long, {"text": long, "choices": ["yes", "no"]}, {"text": "Fine?", "choices": ["yes", "no"]}]
    reply = http.post(f"/v1/images/{image}/questions", json={"questions": asked[:1] + asked[2:], "max_tokens": 2})
    first, second, third = reply.json()["answers"]
    assert "text" in first and set(third["choices"]) == {"yes", "no"}
    error = second["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "questions.1")
    assert "750000 characters" in error["message"] and "32768" in error["message"]
    (answer,) = http.post(f"/v1/images/{image}/questions", json={"questions": asked[1:2]}).json()["answers"]
    assert (answer["error"]["code"], answer["error"]["param"]) == ("context_length_exceeded", "questions.0")
