"""Chat completions with the official client, unchanged."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import httpx2
import openai
import pytest

from tests.gateway.conftest import Services
from tests.gateway.processes import MODEL

ImageFile = Callable[..., bytes]


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def message(*parts: str | dict) -> list[dict]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": content}]


def image(url: str, **fields: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url, **fields}}


def test_answer_carries_usage_and_receipt(client: openai.OpenAI, services: Services, image_file: ImageFile) -> None:
    url, before = data_url(image_file()), services.encodes()
    first = client.chat.completions.create(model=MODEL, messages=message(image(url), "what?"), max_tokens=4)
    again = client.chat.completions.create(model=MODEL, messages=message(image(url), "what else?"), max_tokens=4)
    assert services.encodes() == before + 1
    assert first.object == "chat.completion" and first.model == MODEL and first.id != again.id
    assert first.choices[0].finish_reason in ("stop", "length")
    assert first.usage.prompt_tokens > 6 and first.usage.completion_tokens <= 4
    assert first.receipt["embedding"] == "miss" and first.receipt["encode_ms"] > 0
    assert again.receipt["embedding"] == "hit" and again.receipt["encode_ms"] == 0
    assert first.receipt["fingerprint"] == services.describe_vision().fingerprint
    assert first.receipt["model"] == MODEL and first.receipt["prefill_tokens"] > 0


def test_stream_says_what_the_whole_answer_says(client: openai.OpenAI, image_file: ImageFile) -> None:
    request = {"model": MODEL, "messages": message(image(data_url(image_file())), "tell"), "max_tokens": 8}
    whole = client.chat.completions.create(**request)
    chunks = list(client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == [
        whole.choices[0].finish_reason
    ]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].receipt["embedding"] == "hit"
    assert all(chunk.usage is None for chunk in chunks[:-1])
    plain = list(client.chat.completions.create(**request, stream=True))
    assert plain[-1].choices[0].finish_reason and plain[-1].receipt["model"] == MODEL


def test_logprobs_whole_and_streamed(client: openai.OpenAI) -> None:
    request = {"model": MODEL, "messages": message("count"), "max_tokens": 3, "logprobs": True, "top_logprobs": 2}
    content = client.chat.completions.create(**request).choices[0].logprobs.content
    assert content and all(item.logprob <= 0 and len(item.top_logprobs) == 2 for item in content)
    assert all(item.logprob == pytest.approx(item.top_logprobs[0].logprob) for item in content)  # greedy
    streamed = [
        item
        for chunk in client.chat.completions.create(**request, stream=True)
        for choice in chunk.choices
        if choice.logprobs
        for item in choice.logprobs.content
    ]
    assert [item.token for item in streamed] == [item.token for item in content]


def test_n_answers_with_a_seed_repeat(client: openai.OpenAI) -> None:
    request = {"model": MODEL, "messages": message("dice"), "max_tokens": 6, "temperature": 1.5, "seed": -7, "n": 3}
    answer = client.chat.completions.create(**request)
    again = client.chat.completions.create(**request)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2] and len(set(texts)) > 1
    assert texts == [choice.message.content for choice in again.choices]
    assert answer.usage.completion_tokens > 6
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**request, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def test_several_images_by_reference_and_inline(
    client: openai.OpenAI, http: httpx2.Client, image_file: ImageFile
) -> None:
    data = image_file()
    kept = http.post("/v1/images", files={"file": data}).json()["id"]
    turns = [
        {"role": "system", "content": "Be brief."},
        *message(image(f"lookonce:{kept}"), "first", image(data_url(image_file(112, 56))), "second"),
        {"role": "assistant", "content": "Well.", "refusal": None},
        *message(image(data_url(data)), "the first again"),
    ]
    answer = client.chat.completions.create(model=MODEL, messages=turns, max_tokens=4)
    assert answer.receipt["embedding"] == "miss"
    assert answer.usage.prompt_tokens_details.image_tokens == 6 + 8 + 6


def test_low_detail_makes_fewer_tokens(client: openai.OpenAI, image_file: ImageFile) -> None:
    url = data_url(image_file(840, 560))
    low = client.chat.completions.create(model=MODEL, messages=message(image(url, detail="low"), "?"), max_tokens=1)
    high = client.chat.completions.create(model=MODEL, messages=message(image(url, detail="high"), "?"), max_tokens=1)
    assert low.usage.prompt_tokens_details.image_tokens <= 256 < high.usage.prompt_tokens_details.image_tokens == 600


def test_stop_and_neutral_fields(client: openai.OpenAI) -> None:
    free = (
        client.chat.completions.create(model=MODEL, messages=message("talk"), max_tokens=12).choices[0].message.content
    )
    stop = free[len(free) // 2 : len(free) // 2 + 2]
    stopped = client.chat.completions.create(
        model=MODEL,
        messages=message("talk"),
        max_completion_tokens=12,
        stop=[stop],
        user="u1",
        store=False,
        metadata={"a": "b"},
        response_format={"type": "text"},
        extra_body={"top_k": 5, "min_p": 0.0, "repetition_penalty": 1.0},
    )
    assert stopped.choices[0].message.content == free[: free.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


def test_control_of_single_tokens(client: openai.OpenAI, http: httpx2.Client, image_file: ImageFile) -> None:
    """OpenAI's logit_bias, and vLLM's fields; on a question as on a chat."""

    def said(**fields: Any) -> str:
        options = {"logit_bias": fields.pop("logit_bias")} if "logit_bias" in fields else {}
        answer = client.chat.completions.create(
            model=MODEL, messages=message("talk"), max_tokens=12, extra_body=fields, **options
        )
        return str(answer.choices[0].message.content)

    free = said()
    forced = said(logit_bias={"65": 100})
    assert forced and forced != free and forced == forced[0] * len(forced)
    assert said(allowed_token_ids=[65]) == forced
    assert said(stop_token_ids=[65], logit_bias={"65": 100}) == ""

    def tokens(**fields: Any) -> list[str]:
        asked = {"messages": message("talk"), "max_tokens": 12, "logprobs": True, "extra_body": fields}
        answer = client.chat.completions.create(model=MODEL, **asked)
        return [one.token for one in answer.choices[0].logprobs.content]

    word = next(token for token in tokens() if token.isalpha())
    assert word not in tokens(bad_words=[word])
    kept = http.post("/v1/images", files={"file": image_file()}).json()["id"]
    questions = [{"text": "What?", "allowed_token_ids": [65]}, "What?"]
    body = {"questions": questions, "max_tokens": 12}
    mine, other = http.post(f"/v1/images/{kept}/questions", json=body).json()["answers"]
    assert mine["text"] == forced != other["text"]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"colour": "red"}, "colour", "unknown_parameter"),
        ({"tools": [{"type": "function"}]}, "tools.0.function", "invalid_value"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "invalid_value"),
        ({"logit_bias": {"five": 1}}, "logit_bias.five", "invalid_value"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "invalid_value"),
        ({"allowed_token_ids": []}, "allowed_token_ids", "invalid_value"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0", "invalid_value"),
        ({"bad_words": [""]}, "bad_words.0", "invalid_value"),
        ({"response_format": {"type": "json_array"}}, "response_format.type", "invalid_value"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"n": 1000}, "n", "invalid_value"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "invalid_value"),
        ({"messages": ["hi"]}, "messages.0", "invalid_value"),
        ({"messages": [{"role": "user", "content": {"text": "hi"}}]}, "messages.0.content", "invalid_value"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content", "invalid_value"),
        ({"messages": message({"type": "text", "text": ["hi"]})}, "messages.0.content.0.text", "invalid_value"),
        ({"messages": message({"type": "input_audio"})}, "messages.0.content.0.type", "invalid_value"),
        (
            {"messages": message({"type": "image_url", "image_url": 3})},
            "messages.0.content.0.image_url",
            "invalid_value",
        ),
        ({"messages": message({"type": "image_url"})}, "messages.0.content.0", "invalid_value"),
        (
            {"messages": message({"type": "image_url", "image_url": "x:y"})},
            "messages.0.content.0.image_url",
            "unsupported_value",
        ),
        ({"stop": {"a": 1}}, "stop", "invalid_value"),
        (
            {"messages": message({"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}})},
            None,
            "invalid_image_url",
        ),
        (
            {"messages": message({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}})},
            None,
            "unsupported_value",
        ),
        ({"messages": message(image("data:image/png;base64,AAA"))}, None, "invalid_value"),
        ({"messages": message(image("data:image/png;base64,AAAA"))}, None, "invalid_image"),
        ({"messages": message(*[image("data:image/png;base64,AAAA")] * 33)}, "messages", "invalid_value"),
        ({"stop": [""]}, "stop.0", "invalid_value"),
    ],
)
def test_bad_requests_name_the_field(client: openai.OpenAI, fields: dict, param: str | None, code: str) -> None:
    request = {"messages": message("hi"), "max_tokens": 1} | fields
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, **{"messages": request.pop("messages")}, extra_body=request)
    assert caught.value.code == code, caught.value.message
    assert caught.value.param == (param or "messages.0.content.0.image_url.url")


def test_unknown_model_and_image_are_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no such model"):
        client.chat.completions.create(model="gpt-4o", messages=message("hi"))
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model=MODEL, messages=message(image("lookonce:img_" + "a" * 52)))
    assert caught.value.param == "messages.0.content.0.image_url.url"


def test_too_long_a_prompt_says_so(client: openai.OpenAI) -> None:
    for words in (40_000, 198_000):
        with pytest.raises(openai.BadRequestError, match="context holds 32768: send less text") as caught:
            client.chat.completions.create(model=MODEL, messages=message("word " * words))
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    assert "990000 characters" in caught.value.message


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_more_tokens_than_the_context_holds_are_as_many_as_it_holds(client: openai.OpenAI, name: str) -> None:
    def ask(**fields: Any) -> Any:
        return client.chat.completions.create(model=MODEL, messages=message("How long?"), **fields).choices[0]

    whole = ask(max_tokens=8)
    assert whole.finish_reason == "length"
    stop = whole.message.content[-1]
    for many in (8, 32_769, 2**32 - 1):
        choice = ask(stop=stop, **{name: many})
        assert (choice.finish_reason, choice.message.content) == ("stop", whole.message.content.partition(stop)[0])


def test_least_tokens(client: openai.OpenAI, http: httpx2.Client, image_file: ImageFile) -> None:
    def ask(**fields: Any) -> Any:
        return client.chat.completions.create(
            model=MODEL, messages=message("How long?"), max_tokens=16, extra_body=fields
        )

    whole = ask().choices[0].message.content
    stop = whole[1]
    assert ask(stop=stop).usage.completion_tokens < 16
    full = ask(stop=stop, min_tokens=16)
    assert (full.usage.completion_tokens, full.choices[0].message.content) == (16, whole)
    with pytest.raises(openai.BadRequestError, match="at most max_tokens, 16, got 17") as caught:
        ask(min_tokens=17)
    assert caught.value.param == "min_tokens"
    image_id = http.post("/v1/images", files={"file": image_file()}).json()["id"]
    asked = {"questions": ["What?", {"text": "What?", "min_tokens": 0}], "max_tokens": 12}
    ends = http.post(f"/v1/images/{image_id}/questions", json=asked).json()["answers"][0]["text"][1]
    answers = http.post(f"/v1/images/{image_id}/questions", json=asked | {"stop": ends, "min_tokens": 12}).json()
    first, second = (answer["usage"]["completion_tokens"] for answer in answers["answers"])
    assert first == 12 > second


def test_models(client: openai.OpenAI, http: httpx2.Client) -> None:
    listed = list(client.models.list())
    assert [model.id for model in listed] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"
    assert http.get("/v1/models/other").status_code == 404


def test_how_the_prompt_is_rendered(http: httpx2.Client) -> None:
    """vLLM's fields: without a header, within the last answer, with variables of the template."""

    def asked(messages: list[Any], **fields: Any) -> dict[str, Any]:
        reply = http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 4, **fields})
        assert reply.status_code == 200, reply.text
        found: dict[str, Any] = reply.json()
        return found

    def tokens(messages: list[Any], **fields: Any) -> int:
        return int(asked(messages, **fields)["usage"]["prompt_tokens"])

    user: Any = {"role": "user", "content": "Count."}
    header = tokens([user]) - tokens([user], add_generation_prompt=False)
    assert header > 0
    begun = [user, {"role": "assistant", "content": "One, two,"}]
    within = tokens(begun, continue_final_message=True)
    assert tokens([user]) < within < tokens(begun, add_generation_prompt=False) < tokens(begun)
    free = asked([user])["choices"][0]["message"]["content"]
    going = [user, {"role": "assistant", "content": free}]
    assert asked(going, continue_final_message=True)["choices"][0]["message"]["content"] != free
    assert tokens([user], chat_template_kwargs={"unknown": [1, {"a": "<|im_end|>"}]}) == tokens([user])
    for fields, param in (
        ({"continue_final_message": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt"),
    ):
        reply = http.post("/v1/chat/completions", json={"messages": [user], "max_tokens": 1, **fields})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


def test_a_variable_of_the_template_numbers_images(http: httpx2.Client, image_file: ImageFile) -> None:
    """Qwen2-VL's `add_vision_id` writes "Picture 1: " before the first image."""
    content = [image(data_url(image_file())), {"type": "text", "text": "What?"}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
    plain, numbered = (
        http.post("/v1/chat/completions", json=body | more).json()["usage"]["prompt_tokens"]
        for more in ({}, {"chat_template_kwargs": {"add_vision_id": True}})
    )
    assert numbered > plain
