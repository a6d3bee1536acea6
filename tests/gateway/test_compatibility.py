"""What clients of OpenAI's and vLLM's APIs send without being asked: taken where it asks for nothing, else refused by
name. The fields are those of the OpenAPI document, so that a new one is tried, too."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from typing import Any

import httpx2
import openai
import pytest

from tests.gateway.conftest import Services
from tests.gateway.processes import MODEL, GatewayProcess

ImageFile = Callable[..., bytes]
CHAT = "/v1/chat/completions"
OUTSIDE = ({"surely": "not"}, [{"neither": 1}], "nothing of the kind", 7)  # values that no field here takes


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def user(*content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content) or "Hi", **fields}


def text(said: str = "What?", **fields: Any) -> dict[str, Any]:
    return {"type": "text", "text": said, **fields}


def image(url: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": url, **fields}


def neutral_fields(gateway: GatewayProcess, schema: str) -> dict[str, list[Any]]:
    """By name, the values that the document says a field takes although it does nothing."""
    with gateway.client() as http:
        properties = http.get("/openapi.json").json()["components"]["schemas"][schema]["properties"]
    return {
        name: field["enum"] for name, field in properties.items() if "not supported" in field.get("description", "")
    }


@pytest.fixture(scope="module")
def tables(gateway: GatewayProcess) -> dict[str, dict[str, list[Any]]]:
    return {schema: neutral_fields(gateway, schema) for schema in ("ChatRequest", "QuestionsRequest")}


def test_neutral_values_are_taken_and_others_refused_by_name(
    http: httpx2.Client, tables: dict[str, dict[str, list[Any]]], image_file: ImageFile
) -> None:
    kept = http.post("/v1/images", files={"file": image_file()}).json()["id"]
    asked = {"ChatRequest": (CHAT, {"messages": [user()]})}
    asked["QuestionsRequest"] = (f"/v1/images/{kept}/questions", {"questions": ["What?"]})
    for schema, (path, body) in asked.items():
        table = tables[schema]
        assert {"functions", "prompt_logprobs", "cache_salt", "audio"} <= set(table)
        for number in range(max(map(len, table.values()))):
            every = {name: values[number % len(values)] for name, values in table.items()}
            answer = http.post(path, json={"max_tokens": 1, **every, **body})
            assert answer.status_code == 200, answer.text
        for name, values in table.items():
            assert values[0] is None
            for wrong in OUTSIDE:
                answer = http.post(path, json={name: wrong, **body})
                error = answer.json()["error"]
                assert (answer.status_code, error["code"], error["param"]) == (400, "unsupported_value", name)
                assert "not supported" in error["message"] and f"'{name}' may be null" in error["message"]


def test_true_is_no_number_and_0_is_not_false(http: httpx2.Client) -> None:
    for field, wrong in (("length_penalty", True), ("best_of", True), ("store", 0), ("priority", False)):
        answer = http.post(CHAT, json={"messages": [user()], field: wrong})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == field


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "u", "safety_identifier": "s", "metadata": {"a": "b"}, "prompt_cache_key": "k", "request_id": "r"},
        {"user": None, "metadata": None, "seed": None, "n": None, "stop": None, "stream": None, "temperature": None},
        {"stream_options": None, "logprobs": None, "top_logprobs": None, "max_completion_tokens": None},
        {"logprobs": False, "top_logprobs": 0},
        {"top_k": -1},
        {"max_completion_tokens": 1},
        {"frequency_penalty": 0, "presence_penalty": 0, "repetition_penalty": 1.0, "n": 1, "top_p": 1, "min_p": 0},
    ],
)
def test_defaults_of_fields_that_do_something_are_taken(http: httpx2.Client, fields: dict[str, Any]) -> None:
    answer = http.post(CHAT, json={"model": MODEL, "messages": [user()], "max_tokens": 1, **fields})
    assert answer.status_code == 200, answer.text


def test_messages_as_clients_keep_them(http: httpx2.Client) -> None:
    cache = {"type": "ephemeral", "ttl": "5m"}
    answer = {"role": "assistant", "content": "Yes.", "tool_calls": [], "function_call": None, "annotations": []}
    messages = [
        {"role": "system", "content": [text("Be brief.", cache_control=cache)], "name": None},
        user(text(cache_control=cache), name="bob"),
        {**answer, "refusal": None, "audio": None, "reasoning_content": None, "name": "helper"},
        user(text(prompt_cache_breakpoint={"mode": "explicit"}), cache_control=cache),
    ]
    first = http.post(CHAT, json={"messages": messages, "max_tokens": 4}).json()
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    for message in plain:
        if isinstance(message["content"], list):
            message["content"] = [text(part["text"]) for part in message["content"]]
    second = http.post(CHAT, json={"messages": plain, "max_tokens": 4}).json()
    assert first["choices"] == second["choices"]
    assert first["usage"]["prompt_tokens"] == second["usage"]["prompt_tokens"]  # the model is shown nothing of it
    refused = http.post(CHAT, json={"messages": [{**answer, "function_call": {"name": "f", "arguments": "{}"}}]})
    assert refused.json()["error"]["param"] == "messages.0.function_call" and "functions by" in refused.text


def test_images_in_every_form_that_clients_write(
    http: httpx2.Client, services: Services, image_file: ImageFile
) -> None:
    url, before = data_url(image_file()), services.encodes()
    forms = [image(url), image({"url": url}), image({"url": url, "detail": None})]
    forms += [image({"url": url, "detail": "original"}), image({"url": url, "detail": "auto"}, cache_control=None)]
    said = set()
    for form in forms:
        answer = http.post(CHAT, json={"messages": [user(form, text())], "max_tokens": 4})
        assert answer.status_code == 200, answer.text
        said.add(answer.json()["choices"][0]["message"]["content"])
    assert len(said) == 1 and services.encodes() == before + 1


def test_an_images_uuid_names_it_from_then_on(http: httpx2.Client, services: Services, image_file: ImageFile) -> None:
    def ask(*parts: dict[str, Any]) -> httpx2.Response:
        return http.post(CHAT, json={"messages": [user(*parts, text())], "max_tokens": 4})

    file, before = image_file(), services.encodes()
    first = ask(image(data_url(file), uuid="sku-1234-a")).json()
    again = ask({"type": "image_url", "image_url": None, "uuid": "sku-1234-a"}).json()
    by_url = ask(image("lookonce:sku-1234-a")).json()
    assert services.encodes() == before + 1
    assert first["choices"] == again["choices"] == by_url["choices"]
    assert http.get("/v1/images/sku-1234-a").json()["aliases"] == ["sku-1234-a"]
    assert ask(image(data_url(file), uuid="no name/at all")).status_code == 200
    assert http.get("/v1/images/sku-1234-a").json()["aliases"] == ["sku-1234-a"]
    other = http.post("/v1/images", files={"file": image_file()}).json()["id"]
    assert ask(image(f"lookonce:{other}", uuid="sku-1234-a")).status_code == 200  # names nothing anew
    assert http.get("/v1/images/sku-1234-a").json()["id"] != other
    unknown = ask({"type": "image_url", "uuid": "sku-none"})
    assert unknown.status_code == 404 and unknown.json()["error"]["param"] == "messages.0.content.0.uuid"
    for number in range(20):  # more than an image may have names
        assert ask(image(data_url(file), uuid=f"name-{number}")).status_code == 200


def test_every_chunk_tells_the_usage_so_far(client: openai.OpenAI, image_file: ImageFile) -> None:
    request: dict[str, Any] = {
        "model": MODEL,
        "max_tokens": 12,
        "messages": [user(image(data_url(image_file())), text())],
    }
    whole = client.chat.completions.create(**request, extra_body={"ignore_eos": True}).usage
    for n, options in ((1, {}), (1, {"include_usage": True}), (2, {"include_usage": True})):
        extra = {"ignore_eos": True, "stream_options": {"continuous_usage_stats": True, **options}}
        told = list(client.chat.completions.create(**request, stream=True, n=n, extra_body=extra))
        usages = [chunk.usage for chunk in told]
        assert all(usage is not None for usage in usages)
        assert {usage.prompt_tokens for usage in usages} == {whole.prompt_tokens}
        counts = [usage.completion_tokens for usage in usages]
        assert counts == sorted(counts) and (counts[0], counts[-1]) == (0, n * 12)
        assert all(usage.total_tokens == usage.prompt_tokens + usage.completion_tokens for usage in usages)
        assert bool(told[-1].choices) is not bool(options)


def test_a_streams_tokens_are_counted_though_it_does_not_tell_them(http: httpx2.Client) -> None:
    def counted() -> float:
        found = re.search(r'^lookonce_gateway_tokens_total{kind="completion"} (\S+)$', http.get("/metrics").text, re.M)
        return float(found[1]) if found else 0.0

    before = counted()
    told = http.post(CHAT, json={"messages": [user()], "max_tokens": 3, "ignore_eos": True, "stream": True})
    assert told.text.endswith("data: [DONE]\n\n") and counted() == before + 3


def test_what_others_ask_for_before_they_begin(http: httpx2.Client) -> None:
    assert http.get("/health").json() == http.get("/readyz").json()
    assert http.get("/version").json()["version"] == http.get("/openapi.json").json()["info"]["version"]
    for path in ("/healthz", "/readyz", "/health", "/version", "/metrics"):
        head = http.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-type"] == http.get(path).headers["content-type"]
    assert http.get("/v1/models/lookonce").json()["id"] == "lookonce"


@pytest.mark.parametrize(
    "path", ["/v1/responses/r1/cancel", "/v1/completions", "/v1/messages/count_tokens", "/tokenize", "/v2/rerank"]
)
def test_routes_of_others_are_not_found_and_say_what_there_is(http: httpx2.Client, path: str) -> None:
    answer = http.post(path, json={"model": MODEL, "input": "Hi"})
    error = answer.json()["error"]
    assert answer.status_code == 404 and error["code"] == "not_found" and error["type"] == "invalid_request_error"
    assert f"no {path}: use " in error["message"]
    assert ("/v1/chat/completions" in error["message"]) is (path not in ("/v2/rerank", "/v1/messages/count_tokens"))


def test_images_may_still_be_named_as_others_name_routes(http: httpx2.Client, image_file: ImageFile) -> None:
    assert http.post("/v1/images/edits", json={}).status_code == 404
    http.post("/v1/images", files={"file": image_file()}, data={"alias": "edits"})
    assert http.get("/v1/images/edits").json()["aliases"] == ["edits"]
