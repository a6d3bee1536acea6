"""Answers of a given form through every door: OpenAI's and vLLM's ways of saying it, questions, batches."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, Literal

import httpx2
import openai
import pytest
from pydantic import BaseModel

from tests.gateway.conftest import Services
from tests.gateway.processes import MODEL

ImageFile = Callable[..., bytes]
CHAT = "/v1/chat/completions"
MESSAGES: list[Any] = [{"role": "user", "content": "What?"}]
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "sure": {"type": "boolean"}},
    "required": ["colour", "sure"],
}


class Shape(BaseModel):
    """Of a few values, which random weights come to an end of."""

    colour: Literal["red", "green"]
    sure: bool
    sides: Literal[3, 4] | None = None


def holds(text: str) -> bool:
    value = json.loads(text)
    return set(value) == {"colour", "sure"} and value["colour"] in ("red", "green") and value["sure"] in (True, False)


def test_openais_client_parses(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=Shape, max_tokens=200)
    assert isinstance(parsed.choices[0].message.parsed, Shape) and parsed.choices[0].finish_reason == "stop"
    many = client.chat.completions.parse(
        model=MODEL, messages=MESSAGES, response_format=Shape, max_tokens=200, n=3, temperature=2.0, seed=1
    )
    assert len({choice.message.content for choice in many.choices}) > 1
    with client.chat.completions.stream(
        model=MODEL, messages=MESSAGES, response_format=Shape, max_tokens=200
    ) as events:
        assert isinstance(events.get_final_completion().choices[0].message.parsed, Shape)
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=Shape, max_tokens=5)


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({"structured_outputs": {"json": SCHEMA}}, holds),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, holds),
        ({"guided_json": SCHEMA}, holds),
        ({"structured_outputs": {"regex": "[ab]{3}!"}}, lambda text: re.fullmatch("[ab]{3}!", text)),
        ({"guided_regex": "x|yz"}, lambda text: text in ("x", "yz")),
        ({"structured_outputs": {"choice": ["one way", "the other"]}}, lambda text: text in ("one way", "the other")),
        ({"guided_choice": ["only"]}, lambda text: text == "only"),
        ({"structured_outputs": {"grammar": 'start: "a" B\nB: "b" | "c"'}}, lambda text: text in ("ab", "ac")),
        ({"guided_grammar": 'start: "a" "b"'}, lambda text: text == "ab"),
    ],
)
def test_vllms_fields(http: httpx2.Client, fields: dict[str, Any], form: Callable[[str], Any]) -> None:
    for sampling in ({}, {"temperature": 2.0, "seed": 3}):
        body = {"messages": MESSAGES, "max_tokens": 100, **sampling, **fields}
        (choice,) = http.post(CHAT, json=body).json()["choices"]
        assert form(choice["message"]["content"]) and choice["finish_reason"] == "stop"


def test_any_object_is_one_until_its_length_ends_it(http: httpx2.Client) -> None:
    body = {"messages": MESSAGES, "max_tokens": 60, "response_format": {"type": "json_object"}}
    for seed in range(4):
        (choice,) = http.post(CHAT, json=body | {"temperature": 1.0, "seed": seed}).json()["choices"]
        text = choice["message"]["content"]
        assert text.startswith("{") and choice["finish_reason"] in ("stop", "length")
        assert choice["finish_reason"] == "length" or isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
            "response_format.json_schema.schema",
            '"not"',
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex", "unclosed group"),
        ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs.grammar", "nothing"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "not JSON"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", "not supported"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "two forms"),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"choice": ["b"]}},
            "structured_outputs.choice",
            "two forms",
        ),
    ],
)
def test_errors_name_the_field(http: httpx2.Client, fields: dict[str, Any], param: str, said: str) -> None:
    for stream in (False, True):
        answer = http.post(CHAT, json={"messages": MESSAGES, "max_tokens": 5, "stream": stream, **fields})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, param) and said in error["message"], error


def test_questions_have_forms_of_their_own(http: httpx2.Client, services: Services, image_file: ImageFile) -> None:
    image = http.post("/v1/images", files={"file": image_file()}).json()["id"]
    before = services.encodes()
    questions = [
        {"id": "schema", "text": "Which?", "schema": SCHEMA},
        {"id": "regex", "text": "Which?", "regex": "[0-9]{4}"},
        {"id": "choices", "text": "Which?", "choices": ["yes", "no"]},
        {"id": "bad", "text": "Which?", "schema": {"type": "array", "uniqueItems": True}},
        "Which?",
    ]
    body = {"questions": questions, "max_tokens": 60, "guided_choice": ["by default"]}
    answers = http.post(f"/v1/images/{image}/questions", json=body).json()["answers"]
    schema, regex, choices, bad, other = answers
    assert holds(schema["text"]) and re.fullmatch("[0-9]{4}", regex["text"]) and choices["choices"]
    assert bad["error"]["param"] == "questions.3.schema" and "uniqueItems" in bad["error"]["message"]
    assert other["text"] == "by default" and services.encodes() <= before + 1
    both = {"questions": [{"text": "Which?", "choices": ["a"], "schema": SCHEMA}]}
    error = http.post(f"/v1/images/{image}/questions", json=both).json()["error"]
    assert error["param"] == "questions.0.schema" and "choices" in error["message"]
