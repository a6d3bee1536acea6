"""/v1/responses with OpenAI's client: text, images, forms, tools, streams; kept for a next turn, and erased."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from typing import Any, Literal

import httpx2
import openai
import pytest
from pydantic import BaseModel

from tests.gateway.conftest import Services
from tests.gateway.processes import MODEL, GatewayProcess

ImageFile = Callable[..., bytes]
PATH = "/v1/responses"
RED, BLUE = "red-0123456789abcdef", "blue-0123456789abcdef"
KEYS = {"LOOKONCE_GATEWAY_API_KEYS": f"red={RED},blue={BLUE}", "LOOKONCE_GATEWAY_SECRET": "a secret"}
PAINT = {
    "type": "function",
    "name": "paint",
    "parameters": {"type": "object", "properties": {"colour": {"enum": ["red", "green"]}}, "required": ["colour"]},
}


class Shape(BaseModel):
    colour: Literal["red", "green"]
    sure: bool


@pytest.fixture(scope="module")
def door(services: Services, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """With two tenants, and a store of its own that outlives a restart."""
    store = f"file://{tmp_path_factory.mktemp('images')}"
    with GatewayProcess(*services.arguments(), "--store", store, env=KEYS) as process:
        yield process


@pytest.fixture
def red(door: GatewayProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{door.url}/v1", api_key=RED, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def blue(door: GatewayProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{door.url}/v1", api_key=BLUE, max_retries=0, timeout=60) as client:
        yield client


def seen(data: bytes) -> list[Any]:
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    parts = [
        {"type": "input_image", "image_url": url, "detail": "auto"},
        {"type": "input_text", "text": "What is this?"},
    ]
    return [{"role": "user", "content": parts}]


def test_the_same_answer_as_a_chats(red: openai.OpenAI, image_file: ImageFile, services: Services) -> None:
    data = image_file()
    answer = red.responses.create(model=MODEL, input=seen(data), instructions="Be brief.", max_output_tokens=9)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    part = {"type": "image_url", "image_url": {"url": url}}
    user = {"role": "user", "content": [part, {"type": "text", "text": "What is this?"}]}
    messages: list[Any] = [{"role": "system", "content": "Be brief."}, user]
    before = services.encodes()
    chat = red.chat.completions.create(model=MODEL, messages=messages, max_tokens=9)
    assert services.encodes() == before
    assert answer.output_text == chat.choices[0].message.content
    assert answer.status == ("completed" if chat.choices[0].finish_reason == "stop" else "incomplete")
    assert answer.usage.input_tokens == chat.usage.prompt_tokens
    assert answer.usage.output_tokens == chat.usage.completion_tokens <= 9
    assert answer.model == MODEL and answer.model_extra["receipt"]["embedding"] in ("miss", "hit")


def test_forms_and_tools(red: openai.OpenAI) -> None:
    parsed = red.responses.parse(model=MODEL, input="Which?", text_format=Shape, max_output_tokens=60)
    assert isinstance(parsed.output_parsed, Shape)
    called = red.responses.create(
        model=MODEL,
        input="Paint.",
        tools=[PAINT],
        tool_choice="required",
        parallel_tool_calls=False,
        max_output_tokens=90,
    )
    (call,) = called.output
    assert call.type == "function_call" and json.loads(call.arguments)["colour"] in ("red", "green")
    after = red.responses.create(
        model=MODEL,
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": "done"}],
        previous_response_id=called.id,
        tools=[PAINT],
        tool_choice={"type": "function", "name": "paint"},
        max_output_tokens=90,
    )
    assert after.output[0].type == "function_call" and after.usage.input_tokens > called.usage.input_tokens
    by_hand = red.responses.create(
        model=MODEL,
        input=[{"role": "user", "content": "Paint."}, call, {**_returned(call.call_id)}],
        tools=[PAINT],
        max_output_tokens=3,
    )
    assert by_hand.usage.input_tokens == after.usage.input_tokens


def _returned(name: str) -> Any:
    return {"type": "function_call_output", "call_id": name, "output": "done"}


@pytest.mark.parametrize("tools", [False, True])
def test_events_in_order(red: openai.OpenAI, tools: bool) -> None:
    form = {"type": "json_schema", "name": "shape", "schema": Shape.model_json_schema(), "strict": True}
    calls = {"tools": [PAINT], "tool_choice": "required", "parallel_tool_calls": False}
    more: dict[str, Any] = calls if tools else {"text": {"format": form}}
    whole = red.responses.create(model=MODEL, input="Paint.", max_output_tokens=60, **more)
    events = list(red.responses.create(model=MODEL, input="Paint.", max_output_tokens=60, stream=True, **more))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = list(dict.fromkeys(event.type for event in events))
    begin = ["response.created", "response.in_progress", "response.output_item.added"]
    if tools:
        middle = ["response.function_call_arguments.delta", "response.function_call_arguments.done"]
    else:
        middle = ["response.content_part.added", "response.output_text.delta", "response.output_text.done"]
        middle.append("response.content_part.done")
    assert kinds == [*begin, *middle, "response.output_item.done", f"response.{whole.status}"]
    last = events[-1].response
    assert last.output_text == whole.output_text and last.usage.output_tokens == whole.usage.output_tokens
    with red.responses.stream(model=MODEL, input="Paint.", max_output_tokens=60, **more) as stream:
        final = stream.get_final_response()
    if tools:
        assert final.output[0].arguments == whole.output[0].arguments == last.output[0].arguments
    else:
        assert final.output_text == whole.output_text


def test_a_conversation_goes_on(red: openai.OpenAI, image_file: ImageFile, services: Services) -> None:
    first = red.responses.create(model=MODEL, input=seen(image_file()), max_output_tokens=5)
    before = services.encodes()
    second = red.responses.create(
        model=MODEL, input="And now?", previous_response_id=first.id, max_output_tokens=5, stream=False
    )
    assert services.encodes() == before and second.usage.input_tokens > first.usage.input_tokens
    assert second.usage.input_tokens_details.cached_tokens > 0 and second.previous_response_id == first.id
    assert red.responses.retrieve(first.id).output_text == first.output_text
    unkept = red.responses.create(model=MODEL, input="Hi", store=False, max_output_tokens=2)
    for gone in (unkept.id, "resp_nothing"):
        with pytest.raises(openai.NotFoundError) as caught:
            red.responses.create(model=MODEL, input="And?", previous_response_id=gone)
        assert caught.value.body["param"] == "previous_response_id"
    red.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        red.responses.retrieve(second.id)
    assert red.responses.retrieve(first.id).id == first.id


def test_nobody_elses_response_is_reached(red: openai.OpenAI, blue: openai.OpenAI) -> None:
    mine = red.responses.create(model=MODEL, input="A secret.", max_output_tokens=2)
    for call in (
        lambda: blue.responses.retrieve(mine.id),
        lambda: blue.responses.delete(mine.id),
        lambda: blue.responses.create(model=MODEL, input="And?", previous_response_id=mine.id),
    ):
        with pytest.raises(openai.NotFoundError):
            call()
    assert red.responses.retrieve(mine.id).id == mine.id


def test_erasing_an_image_erases_what_was_made_from_it(
    red: openai.OpenAI, door: GatewayProcess, image_file: ImageFile
) -> None:
    data = image_file()
    with door.client(RED) as http:
        image = http.post("/v1/images", files={"file": data}).json()["id"]
        first = red.responses.create(model=MODEL, input=seen(data), max_output_tokens=2)
        second = red.responses.create(model=MODEL, input="And?", previous_response_id=first.id, max_output_tokens=2)
        other = red.responses.create(model=MODEL, input="Hi", max_output_tokens=2)
        assert http.delete(f"/v1/images/{image}").json()["complete"] is True
        for made in (first, second):
            assert http.get(f"{PATH}/{made.id}").status_code == 404
        http.post("/v1/images", files={"file": data})  # the same image again is another upload
        for made in (first, second):
            assert http.get(f"{PATH}/{made.id}").status_code == 404
        assert http.get(f"{PATH}/{other.id}").status_code == 200


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"input": []}, "input", "at least 1"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type", "function_call"),
        ({"input": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "input.0.content.0.type", "input_text"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "function"),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}},
            "text.format.schema",
            "not",
        ),
        ({"background": True}, "background", "not supported"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort", "not supported"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x:y"}]}]}, "input", "lookonce"),
        ({"model": "gpt-9"}, "model", "no such model"),
    ],
)
def test_errors_name_the_field(http: httpx2.Client, fields: dict[str, Any], param: str, said: str) -> None:
    reply = http.post(PATH, json={"input": "Hi", "max_output_tokens": 3, **fields})
    error = reply.json()["error"]
    assert reply.status_code in (400, 404) and error["param"] == param and said in error["message"], error
