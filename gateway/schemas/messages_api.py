"""Bodies of Anthropic's Messages API, and the chat each is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import orjson
from pydantic import Discriminator, Field, Tag

from gateway.schemas.body import (
    Body,
    MaxTokens,
    Probability,
    Stops,
    Temperature,
    TopK,
    TopP,
    by_field,
    text_or_list,
)
from gateway.schemas.neutral import Hint, Neutral, PartFields
from gateway.schemas.requests import REFERENCE, Text
from gateway.schemas.structure import JsonSchema
from gateway.schemas.tools import CallId, FunctionName


class TextBlock(PartFields):
    """Text."""

    type: Literal["text"]
    text: str
    citations: Annotated[Any, Neutral("citations are", [])] = None


class Base64Source(Body):
    """An image within the request."""

    type: Literal["base64"]
    media_type: Hint
    data: Text


class UrlSource(Body):
    """An image at a URL, or kept here (lookonce:ID)."""

    type: Literal["url"]
    url: Text


class FileSource(Body):
    """An image that is kept here, by its id or alias."""

    type: Literal["file"]
    file_id: Text


Source = Annotated[
    Annotated[Base64Source, Tag("(base64)")]
    | Annotated[UrlSource, Tag("(url)")]
    | Annotated[FileSource, Tag("(file)")],
    by_field("type", "base64", "url", "file", others="other sources are not supported"),
]


class ImageBlock(PartFields):
    """An image."""

    type: Literal["image"]
    source: Source


class ToolUseBlock(PartFields):
    """A call that an earlier answer wanted made."""

    type: Literal["tool_use"]
    id: CallId
    name: FunctionName
    input: dict[str, Any]
    caller: Any = None


class ToolResultBlock(PartFields):
    """What it returned."""

    type: Literal["tool_result"]
    tool_use_id: CallId
    content: (
        Annotated[
            Annotated[str, Tag("(text)")] | Annotated[list[TextBlock], Tag("(list)")], Discriminator(text_or_list)
        ]
        | None
    ) = None
    is_error: bool | None = None


Block = Annotated[
    Annotated[TextBlock, Tag("(text)")]
    | Annotated[ImageBlock, Tag("(image)")]
    | Annotated[ToolUseBlock, Tag("(tool_use)")]
    | Annotated[ToolResultBlock, Tag("(tool_result)")],
    by_field("type", "text", "image", "tool_use", "tool_result", others="documents and thinking are not supported"),
]


class Message(Body):
    """A turn."""

    role: Literal["user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("(text)")] | Annotated[list[Block], Field(min_length=1), Tag("(list)")],
        Discriminator(text_or_list),
    ]


class MessageTool(PartFields):
    """A function that the caller runs."""

    type: Literal["custom"] | None = None
    name: FunctionName
    description: Annotated[str, Field(max_length=100_000)] | None = None
    input_schema: JsonSchema
    strict: bool | None = None


class MessageToolChoice(Body):
    """Which function, if any."""

    type: Literal["auto", "any", "tool", "none"]
    name: FunctionName | None = None
    disable_parallel_tool_use: bool | None = None


class OutputFormat(Body):
    """The form of the answer."""

    type: Literal["json_schema"]
    schema_: Annotated[JsonSchema, Field(alias="schema")]


class OutputOptions(Body):
    """How the answer is given."""

    format: OutputFormat | None = None
    effort: Annotated[Any, Neutral("effort is")] = None


class Metadata(Body):
    """Who asks."""

    user_id: Hint | None = None


class MessagesRequest(Body):
    """POST /v1/messages."""

    model: Annotated[str, Field(max_length=512)] | None = None
    max_tokens: MaxTokens
    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    system: (
        Annotated[
            Annotated[str, Tag("(text)")] | Annotated[list[TextBlock], Tag("(list)")], Discriminator(text_or_list)
        ]
        | None
    ) = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: Probability | None = None
    stop_sequences: Stops | None = None
    stream: bool | None = None
    tools: Annotated[list[MessageTool] | None, Field(max_length=128)] = None
    tool_choice: MessageToolChoice | None = None
    output_config: OutputOptions | None = None
    metadata: Metadata | None = None
    service_tier: Annotated[Any, Neutral("another service tier is", "auto", "standard_only")] = None
    thinking: Annotated[Any, Neutral("thinking is", {"type": "disabled"})] = None
    cache_control: Any = None


def chat_of(body: MessagesRequest) -> dict[str, Any]:
    """The chat request it is."""
    system = [{"role": "system", "content": _text(body.system)}] if body.system else []
    turns = [turn for message in body.messages for turn in _turns(message)]
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": system + turns,
        "max_tokens": body.max_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "min_p": body.min_p,
        "stop": body.stop_sequences or None,
        "stream": body.stream,
        "user": body.metadata.user_id if body.metadata is not None else None,
    }
    if body.output_config is not None and body.output_config.format is not None:
        named = {"name": "answer", "schema": body.output_config.format.schema_}
        fields["response_format"] = {"type": "json_schema", "json_schema": named}
    if body.tools:
        fields |= _tools(body.tools, body.tool_choice or MessageToolChoice(type="auto"))
    return {name: value for name, value in fields.items() if value is not None}


def _tools(tools: list[MessageTool], choice: MessageToolChoice) -> dict[str, Any]:
    functions = [
        {"name": tool.name, "parameters": tool.input_schema}
        | ({"description": tool.description} if tool.description is not None else {})
        for tool in tools
    ]
    chosen: Any = {"any": "required"}.get(choice.type, choice.type)
    if choice.type == "tool":
        chosen = {"type": "function", "function": {"name": choice.name or ""}}
    fields: dict[str, Any] = {"tools": [{"type": "function", "function": function} for function in functions]}
    return {**fields, "tool_choice": chosen, "parallel_tool_calls": not choice.disable_parallel_tool_use}


def _turns(message: Message) -> Iterator[dict[str, Any]]:
    """What calls returned comes before the words beside it."""
    if isinstance(message.content, str):
        yield {"role": message.role, "content": message.content}
        return
    for block in message.content:
        if isinstance(block, ToolResultBlock):
            yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": _text(block.content or "")}
    parts = [_part(block) for block in message.content if isinstance(block, TextBlock | ImageBlock)]
    calls = [
        {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": _json(block.input)}}
        for block in message.content
        if isinstance(block, ToolUseBlock)
    ]
    if calls:
        yield {"role": message.role, "content": parts or None, "tool_calls": calls}
    elif parts:
        yield {"role": message.role, "content": parts}


def _json(value: Any) -> str:
    return orjson.dumps(value).decode()


def _part(block: TextBlock | ImageBlock) -> dict[str, Any]:
    if isinstance(block, TextBlock):
        return {"type": "text", "text": block.text}
    source = block.source
    if isinstance(source, Base64Source):
        return {"type": "image_url", "image_url": {"url": f"data:{source.media_type};base64,{source.data}"}}
    return {
        "type": "image_url",
        "image_url": {"url": source.url if isinstance(source, UrlSource) else f"{REFERENCE}{source.file_id}"},
    }


def _text(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)
