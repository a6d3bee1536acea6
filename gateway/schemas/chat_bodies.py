"""OpenAI's chat completion request, as far as it is supported. Fields that would change the answer but can't be served
are refused by name; fields that are neutral here are taken (gateway.schemas.neutral)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from gateway.schemas.body import Body, MaxTokens, Sampling, by_field, text_or_list, text_or_object
from gateway.schemas.neutral import AnswerFields, Hint, MessageFields, Neutral, PartFields, RequestFields
from gateway.schemas.question_bodies import Detail, Stop

REFERENCE = "lookonce:"
"""Begins the URL of an image that is kept: its id or an alias follows."""
Url = Annotated[str, Field(min_length=1)]


class TextPart(PartFields):
    """Text."""

    type: Literal["text"]
    text: str


class ImageUrl(Body):
    """Where the image is: an https:, http: or data: URL, or "lookonce:IMAGE_ID". `detail` bounds its pixels."""

    url: Url
    detail: Detail | None = None


class ImageUrlPart(PartFields):
    """An image. `uuid` is vLLM's: a name for the image by which a later request means it, without an `image_url`."""

    type: Literal["image_url"]
    image_url: (
        Annotated[Annotated[Url, Tag("(text)")] | Annotated[ImageUrl, Tag("(object)")], Discriminator(text_or_object)]
        | None
    ) = None
    uuid: Hint | None = None

    @model_validator(mode="after")
    def _named(self) -> ImageUrlPart:
        if self.image_url is None and not self.uuid:
            raise ValueError("'image_url' is required, or the 'uuid' of an earlier image")
        return self

    @property
    def url(self) -> str:
        """The URL, in whatever form it was given."""
        if self.image_url is None:
            return f"{REFERENCE}{self.uuid}"
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url

    @property
    def field(self) -> str:
        """Where in the part the image is named."""
        if self.image_url is None:
            return "uuid"
        return "image_url" if isinstance(self.image_url, str) else "image_url.url"

    @property
    def detail(self) -> Detail | None:
        """What bounds its pixels."""
        return self.image_url.detail if isinstance(self.image_url, ImageUrl) else None


AnyPart = Annotated[
    Annotated[TextPart, Tag("(text)")] | Annotated[ImageUrlPart, Tag("(image_url)")],
    by_field("type", "text", "image_url", others="audio, files and video are not supported"),
]
UserContent = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[list[AnyPart], Field(min_length=1), Tag("(list)")],
    Discriminator(text_or_list),
]
TextContent = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[list[TextPart], Field(min_length=1), Tag("(list)")],
    Discriminator(text_or_list),
]


class SystemMessage(MessageFields):
    """Instructions."""

    role: Literal["system", "developer"]
    content: TextContent


class UserMessage(MessageFields):
    """The user's turn: text and images."""

    role: Literal["user"]
    content: UserContent


class AssistantMessage(AnswerFields):
    """An earlier answer."""

    role: Literal["assistant"]
    content: TextContent


AnyMessage = Annotated[
    Annotated[SystemMessage, Tag("(system)")]
    | Annotated[SystemMessage, Tag("(developer)")]
    | Annotated[UserMessage, Tag("(user)")]
    | Annotated[AssistantMessage, Tag("(assistant)")],
    by_field("role", "system", "developer", "user", "assistant", others="tools are not supported"),
]


class StreamOptions(Body):
    """Whether the last chunk tells the usage, and whether each chunk tells it so far (vLLM's)."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Annotated[Any, Neutral("obfuscation is", False)] = None


class ChatRequest(Sampling, RequestFields):
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
