"""/v1/messages, as Anthropic's API has it: text, images, tools, forms, stop sequences and events in order."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from tests.gateway.conftest import Services

ImageFile = Callable[..., bytes]
PATH = "/v1/messages"
HI: list[Any] = [{"role": "user", "content": "Paint."}]
PAINT = {
    "name": "paint",
    "input_schema": {"type": "object", "properties": {"colour": {"enum": ["red", "green"]}}, "required": ["colour"]},
}
FORM = {
    "type": "json_schema",
    "schema": {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]},
}


def asked(http: httpx2.Client, **fields: Any) -> dict[str, Any]:
    reply = http.post(PATH, json={"max_tokens": 60, "messages": HI, **fields})
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def events(http: httpx2.Client, **fields: Any) -> list[dict[str, Any]]:
    lines = http.post(PATH, json={"max_tokens": 60, "messages": HI, "stream": True, **fields}).text.splitlines()
    named = [line[7:] for line in lines if line.startswith("event: ")]
    found = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    assert named == [event["type"] for event in found]
    return found


def test_the_same_answer_as_a_chats(http: httpx2.Client, image_file: ImageFile, services: Services) -> None:
    data = base64.b64encode(image_file()).decode()
    source = {"type": "base64", "media_type": "image/png", "data": data}
    content = [{"type": "image", "source": source}, {"type": "text", "text": "What is this?"}]
    mine = asked(http, messages=[{"role": "user", "content": content}], system="Be brief.", max_tokens=9)
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    user = {"role": "user", "content": [part, {"type": "text", "text": "What is this?"}]}
    body = {"messages": [{"role": "system", "content": "Be brief."}, user], "max_tokens": 9}
    before = services.encodes()
    chat = http.post("/v1/chat/completions", json=body).json()
    assert services.encodes() == before
    assert mine["content"] == [{"type": "text", "text": chat["choices"][0]["message"]["content"], "citations": None}]
    spent = mine["usage"]
    assert spent["input_tokens"] + spent["cache_read_input_tokens"] == chat["usage"]["prompt_tokens"]
    assert spent["output_tokens"] == chat["usage"]["completion_tokens"]
    assert mine["stop_reason"] == ("max_tokens" if chat["choices"][0]["finish_reason"] == "length" else "end_turn")
    assert mine["receipt"]["embedding"] in ("hit", "miss")


def test_tools_and_what_they_return(http: httpx2.Client) -> None:
    for choice in ({"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "paint"}):
        mine = asked(http, tools=[PAINT], tool_choice=choice)
        (block,) = mine["content"]
        assert block["type"] == "tool_use" and block["input"]["colour"] in ("red", "green")
        assert mine["stop_reason"] == "tool_use" and block["id"] and block["name"] == "paint"
    result = {"type": "tool_result", "tool_use_id": block["id"], "content": [{"type": "text", "text": "done"}]}
    turns = [*HI, {"role": "assistant", "content": mine["content"]}, {"role": "user", "content": [result]}]
    after = asked(http, messages=turns, tools=[PAINT], max_tokens=3)
    before = asked(http, tools=[PAINT], max_tokens=3)
    total = [one["usage"]["input_tokens"] + one["usage"]["cache_read_input_tokens"] for one in (before, after)]
    assert total[1] > total[0] + 20


def test_a_form_and_a_stop_sequence(http: httpx2.Client) -> None:
    formed = asked(http, output_config={"format": FORM})
    text = formed["content"][0]["text"]
    assert json.loads(text)["a"] in (True, False) and formed["stop_reason"] == "end_turn"
    stopped = asked(http, output_config={"format": FORM}, stop_sequences=['"a"'])
    assert stopped["content"][0]["text"] == "{"
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", '"a"')
    streamed = events(http, output_config={"format": FORM}, stop_sequences=['"a"'])
    assert streamed[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": '"a"'}


@pytest.mark.parametrize("tools", [False, True])
def test_events_in_order(http: httpx2.Client, tools: bool) -> None:
    calls = {"tools": [PAINT], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}
    more: dict[str, Any] = calls if tools else {"output_config": {"format": FORM}}
    whole, found = asked(http, **more), events(http, **more)
    kinds = list(dict.fromkeys(event["type"] for event in found))
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert kinds == ["message_start", *block, "message_delta", "message_stop"]
    name = "partial_json" if tools else "text"
    said = "".join(event["delta"][name] for event in found if event["type"] == "content_block_delta")
    (wanted,) = whole["content"]
    assert json.loads(said) == (wanted["input"] if tools else json.loads(wanted["text"]))
    assert found[-2]["delta"]["stop_reason"] == whole["stop_reason"]
    assert found[-2]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"max_tokens": None}, "max_tokens", "whole number"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "messages.0.content.0.type", "documents"),
        ({"thinking": {"type": "enabled"}}, "thinking", "not supported"),
        ({"tools": [PAINT], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice", "'x'"),
    ],
)
def test_errors_name_the_field(http: httpx2.Client, fields: dict[str, Any], param: str, said: str) -> None:
    reply = http.post(PATH, json={"max_tokens": 5, "messages": HI, **fields})
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["param"] == param and said in error["message"], error
