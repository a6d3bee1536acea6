"""Ollama's routes: whole and in lines, images, forms and calls."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from tests.gateway.conftest import Services

ImageFile = Callable[..., bytes]
SCHEMA = {"type": "object", "properties": {"sure": {"type": "boolean"}}, "required": ["sure"]}
TOOL = {"type": "function", "function": {"name": "tell", "parameters": SCHEMA}}


def chat(http: httpx2.Client, message: dict[str, Any], **fields: Any) -> httpx2.Response:
    body = {"model": "lookonce", "messages": [{"role": "user", **message}], "options": {"num_predict": 40}, **fields}
    return http.post("/api/chat", json=body)


def test_the_same_answer_as_a_chats(http: httpx2.Client, services: Services, image_file: ImageFile) -> None:
    data = base64.b64encode(image_file()).decode()
    asked = {"content": "What?", "images": [data]}
    whole = chat(http, asked, stream=False, options={"num_predict": 9}).json()
    part = {"type": "image_url", "image_url": f"data:image/png;base64,{data}"}
    user = {"role": "user", "content": [part, {"type": "text", "text": "What?"}]}
    before = services.encodes()
    theirs = http.post("/v1/chat/completions", json={"messages": [user], "max_tokens": 9}).json()
    assert services.encodes() == before
    assert whole["message"] == {"role": "assistant", "content": theirs["choices"][0]["message"]["content"]}
    assert whole["done"] is True and whole["done_reason"] in ("stop", "length") and whole["total_duration"] > 0
    assert (whole["prompt_eval_count"], whole["eval_count"]) == tuple(
        theirs["usage"][name] for name in ("prompt_tokens", "completion_tokens")
    )
    reply = chat(http, asked, options={"num_predict": 9})
    lines = [json.loads(line) for line in reply.text.splitlines()]
    assert reply.headers["content-type"].startswith("application/x-ndjson")
    assert "".join(line["message"]["content"] for line in lines) == whole["message"]["content"]
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    body = {"model": "lookonce", "prompt": "What?", "images": [data], "stream": False, "options": {"num_predict": 9}}
    assert http.post("/api/generate", json=body).json()["response"] == whole["message"]["content"]


def test_forms_and_names(http: httpx2.Client) -> None:
    formed = chat(http, {"content": "Sure?"}, format=SCHEMA, stream=False).json()
    assert json.loads(formed["message"]["content"])["sure"] in (True, False)
    named = http.get("/api/tags").json()["models"]
    assert named[0]["name"] == named[0]["model"]
    free = chat(http, {"content": "Sure?"}, tools=[TOOL], stream=False)
    assert free.status_code == 200 and free.json()["done"] is True


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"format": "xml"}, "format"), ({"think": True}, "think"), ({"options": {"colour": 1}}, "options.colour")],
)
def test_errors_name_the_field(http: httpx2.Client, fields: dict[str, Any], param: str) -> None:
    reply = chat(http, {"content": "Hi"}, **fields)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == param
