"""Bodies of Ollama's API, and the chat each is."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import orjson
from pydantic import Discriminator, Field, Tag

from gateway.schemas.body import (
    MAX_STOPS,
    Body,
    Penalty,
    Probability,
    RepetitionPenalty,
    Seed,
    StopString,
    Temperature,
    TopK,
    TopP,
    text_or_object,
)
from gateway.schemas.neutral import Neutral
from gateway.schemas.requests import Text
from gateway.schemas.responses import Answered, Receipt
from gateway.schemas.structure import JsonSchema
from gateway.schemas.tools import FunctionName, Tool

Form = Annotated[
    Annotated[Literal["", "json"], Tag("(text)")] | Annotated[JsonSchema, Tag("(object)")],
    Discriminator(text_or_object),
]


class OllamaOptions(Body):
    """How an answer is written. What concerns how a model is loaded is taken, and changes nothing here."""

    temperature: Temperature | None = None
    top_k: TopK | None = None
    top_p: TopP | None = None
    min_p: Probability | None = None
    seed: Seed | None = None
    num_predict: Annotated[int, Field(ge=-2, lt=2**31, description="-1 and -2: as many as fit")] | None = None
    stop: Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    repeat_penalty: RepetitionPenalty | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    num_ctx: Any = None
    num_batch: Any = None
    num_gpu: Any = None
    num_thread: Any = None
    num_keep: Any = None
    main_gpu: Any = None
    use_mmap: Any = None
    repeat_last_n: Any = None
    typical_p: Annotated[Any, Neutral("typical sampling is", 1.0)] = None


class OllamaFunctionCall(Body):
    """Of a function, with its arguments."""

    name: FunctionName
    arguments: dict[str, Any]
    index: int | None = None


class OllamaCall(Body):
    """A call of an earlier answer."""

    function: OllamaFunctionCall
    id: str | None = None


class OllamaMessage(Body):
    """A turn; images are base64."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    images: Annotated[list[Text] | None, Field(max_length=64)] = None
    tool_calls: Annotated[list[OllamaCall] | None, Field(max_length=128)] = None
    tool_name: str | None = None
    tool_call_id: str | None = None
    thinking: Annotated[Any, Neutral("thinking is", "")] = None


class _Common(Body):
    model: Annotated[str, Field(max_length=512)]
    stream: Annotated[bool | None, Field(description="in lines of JSON (unless false)")] = None
    format: Form | None = None
    options: OllamaOptions | None = None
    keep_alive: Any = None
    think: Annotated[Any, Neutral("thinking is", False)] = None
    logprobs: Annotated[Any, Neutral("logprobs of an answer's tokens are", False)] = None
    top_logprobs: Annotated[Any, Neutral("logprobs of an answer's tokens are", 0)] = None


class OllamaChatRequest(_Common):
    """POST /api/chat."""

    messages: Annotated[list[OllamaMessage], Field(min_length=1, max_length=1024)]
    tools: Annotated[list[Tool] | None, Field(max_length=128)] = None


class OllamaGenerateRequest(_Common):
    """POST /api/generate."""

    prompt: str
    system: str | None = None
    images: Annotated[list[Text] | None, Field(max_length=64)] = None
    suffix: Annotated[Any, Neutral("filling in is", "")] = None
    template: Annotated[Any, Neutral("another chat template is", "")] = None
    context: Annotated[Any, Neutral("a context of tokens is", [])] = None
    raw: Annotated[Any, Neutral("a prompt without the chat template is", False)] = None


class OllamaAnswer(Answered):
    """An answer, or a piece of one: `message` of a chat, `response` of a prompt. Durations are nanoseconds."""

    model: str
    created_at: str
    message: dict[str, Any] | None = None
    response: str | None = None
    done: bool
    done_reason: Literal["stop", "length"] | None = None
    total_duration: int | None = None
    load_duration: int | None = None
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None
    receipt: Receipt | None = None


class OllamaModel(Answered):
    """A model that is served."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: dict[str, Any]


class OllamaModels(Answered):
    """All of them."""

    models: list[OllamaModel]


def chat_of(body: OllamaChatRequest | OllamaGenerateRequest) -> dict[str, Any]:
    """The chat request it is."""
    options = body.options or OllamaOptions()
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": _messages(body),
        "max_tokens": options.num_predict if options.num_predict and options.num_predict > 0 else None,
        "stop": options.stop or None,
        "repetition_penalty": options.repeat_penalty,
        **{name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "min_p", "seed")},
        **{name: getattr(options, name) for name in ("presence_penalty", "frequency_penalty")},
    }
    if body.format == "json":
        fields["response_format"] = {"type": "json_object"}
    elif body.format is not None and not isinstance(body.format, str):
        fields["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": body.format}}
    if isinstance(body, OllamaChatRequest) and body.tools:
        fields["tools"] = [tool.model_dump(exclude_none=True) for tool in body.tools]
    return {name: value for name, value in fields.items() if value is not None}


def _messages(body: OllamaChatRequest | OllamaGenerateRequest) -> list[dict[str, Any]]:
    if isinstance(body, OllamaChatRequest):
        return [_message(message) for message in body.messages]
    system = [{"role": "system", "content": body.system}] if body.system else []
    return [*system, {"role": "user", "content": _content(body.prompt, body.images)}]


def _message(message: OllamaMessage) -> dict[str, Any]:
    if message.role == "tool":
        return {"role": "tool", "tool_call_id": message.tool_call_id or "", "content": message.content or ""}
    made: dict[str, Any] = {"role": message.role, "content": _content(message.content or "", message.images)}
    if message.tool_calls:
        made["tool_calls"] = [
            {
                "id": call.id or "",
                "type": "function",
                "function": {"name": call.function.name, "arguments": orjson.dumps(call.function.arguments).decode()},
            }
            for call in message.tool_calls
        ]
    return made


def _content(text: str, images: list[str] | None) -> Any:
    """Images come first: what follows is asked about them."""
    if not images:
        return text
    parts = [{"type": "image_url", "image_url": {"url": _url(image)}} for image in images]
    return [*parts, *([{"type": "text", "text": text}] if text else [])]


def _url(image: str) -> str:
    return image if image.startswith(("lookonce:", "data:")) else f"data:image/png;base64,{image}"
