"""OpenAI's chat completion request, as far as it is supported. Fields that would change the answer but can't be served
are refused by name; fields that are neutral here are taken."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from gateway.schemas.base import Body
from gateway.schemas.questions import Detail, Stop
from gateway.schemas.sampling import MaxTokens, Sampling
from gateway.schemas.unions import by_field, text_or_list

Hint = Annotated[str, Field(max_length=512)]


class TextPart(Body):
    """Text."""

    type: Literal["text"]
    text: str


class ImageUrl(Body):
    """Where the picture is: an https:, http: or data: URL, or "lookonce:IMAGE_ID". `detail` bounds its pixels."""

    url: Annotated[str, Field(min_length=1)]
    detail: Detail = "auto"


class ImageUrlPart(Body):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageUrl


AnyPart = Annotated[
    Annotated[TextPart, Tag("(text)")] | Annotated[ImageUrlPart, Tag("(image_url)")], Discriminator(by_field("type"))
]
UserContent = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[list[AnyPart], Field(min_length=1), Tag("(list)")],
    Discriminator(text_or_list),
]
TextContent = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[list[TextPart], Field(min_length=1), Tag("(list)")],
    Discriminator(text_or_list),
]


class SystemMessage(Body):
    """Instructions."""

    role: Literal["system", "developer"]
    content: TextContent


class UserMessage(Body):
    """The user's turn: text and pictures."""

    role: Literal["user"]
    content: UserContent


class AssistantMessage(Body):
    """An earlier answer. The fields that OpenAI's client dumps as null are taken as null."""

    role: Literal["assistant"]
    content: TextContent
    refusal: None = None
    annotations: list[Any] | None = Field(None, max_length=0)
    audio: None = None
    function_call: None = None
    tool_calls: None = None


AnyMessage = Annotated[
    Annotated[SystemMessage, Tag("(system)")]
    | Annotated[SystemMessage, Tag("(developer)")]
    | Annotated[UserMessage, Tag("(user)")]
    | Annotated[AssistantMessage, Tag("(assistant)")],
    Discriminator(by_field("role")),
]


class StreamOptions(Body):
    """Whether the last chunk tells the usage."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class ResponseFormat(Body):
    """Plain text only."""

    type: Literal["text"]


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    model: Annotated[str, Field(max_length=512)] | None = None
    messages: Annotated[list[AnyMessage], Field(min_length=1, max_length=1024)]
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    # Neutral here: they ask for nothing that is not done anyway.
    user: Hint | None = None
    safety_identifier: Hint | None = None
    prompt_cache_key: Hint | None = None
    metadata: Annotated[dict[str, Hint], Field(max_length=16)] | None = None
    store: Literal[False] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    service_tier: Literal["auto", "default"] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
