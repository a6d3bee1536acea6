"""Bodies of requests about images, of chats and moderations, as far as OpenAI's are supported. Fields that would change
the answer but can't be served are refused by name; fields that are neutral here are taken (gateway.schemas.neutral)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import orjson
from pydantic import Discriminator, Field, Tag, model_validator

from gateway.schemas.body import (
    Body,
    MaxTokens,
    PixelFields,
    Sampling,
    Stops,
    StopString,
    by_field,
    text_or_list,
    text_or_object,
)
from gateway.schemas.neutral import AnswerFields, Hint, MessageFields, Neutral, PartFields, RequestFields
from gateway.schemas.structure import JsonSchema, Source, StructureFields
from gateway.schemas.tools import CalledTool, CallId, ToolFields
from lookonce.core.errors import invalid
from protos.lookonce.v1 import language_pb2

Text = Annotated[str, Field(min_length=1)]
Identifier = Annotated[str, Field(min_length=1, max_length=128)]
Detail = Literal["low", "high", "auto", "original"]
Stop = Annotated[Annotated[StopString, Tag("(text)")] | Annotated[Stops, Tag("(list)")], Discriminator(text_or_list)]
Alias = Annotated[str, Field(min_length=1, max_length=64, description="a name to use in place of the id")]
ImageTtl = Annotated[int, Field(ge=1, le=2**31 - 1, description="seconds to keep the image")]
ProcessorOptions = Annotated[PixelFields, Field(description="vLLM's and SGLang's name for bounds of all images")]
REFERENCE = "lookonce:"
"""Begins the URL of an image that is kept: its id or an alias follows."""


class ImageChange(Body):
    """How an image is to be kept from now on; what is left out stays as it is."""

    ttl: ImageTtl | None = None
    pinned: Annotated[bool, Field(description="keep it until it is erased")] | None = None
    alias: Alias | None = None


class ImageUpload(ImageChange, PixelFields):
    """An image as base64 (plain, or a data: URL) or by URL; exactly one of the two. It is encoded within the bounds."""

    data: Text | None = None
    url: Text | None = None
    prefill: Annotated[bool, Field(description="also fill the prefix of the questions to come")] | None = None


class Parameters(Sampling):
    """What a question may set for itself, and a request for all of its questions."""

    max_tokens: MaxTokens | None = None
    stop: Stop | None = None


class NumberScale(Body):
    """Whole numbers from one to another."""

    min: Annotated[int, Field(ge=-1000, le=1000)]
    max: Annotated[int, Field(ge=-1000, le=1000)]

    @model_validator(mode="after")
    def _ordered(self) -> NumberScale:
        if not 1 <= self.max - self.min <= 100:
            raise ValueError("'max' must be 1 to 100 more than 'min'")
        return self


def _labels_or_numbers(value: Any) -> str:
    return "(list)" if isinstance(value, list) else "(object)"


Scale = Annotated[
    Annotated[list[Text], Field(min_length=2, max_length=101), Tag("(list)")] | Annotated[NumberScale, Tag("(object)")],
    Discriminator(_labels_or_numbers),
]
QuestionType = Literal["text", "choice", "yes_no", "rating", "many_of", "extract"]


class Question(Parameters):
    """One question. Its `type` says how it is answered, or else the field that it has: `choices`, `scale` and `labels`
    get probabilities, and no text is written; with `schema` or `regex` the text is of that form."""

    id: Identifier | None = None
    text: Text
    choices: Annotated[list[Text], Field(min_length=1)] | None = None
    schema_: Annotated[JsonSchema | None, Field(alias="schema", description="the answer is JSON of this schema")] = None
    regex: Annotated[Source | None, Field(description="the answer is a text of this regular expression")] = None
    type: Annotated[QuestionType | None, Field(description="yes_no: the probability of yes")] = None
    scale: Annotated[Scale | None, Field(description="labels from low to high (1, 2, ...), or numbers")] = None
    labels: Annotated[
        list[Text] | None,
        Field(min_length=1, description="each gets a probability of its own; {label} in the text is where it goes"),
    ] = None
    tell_options: Annotated[bool | None, Field(description="write the options below the question")] = None
    debias: Annotated[bool | None, Field(description="ask in several orders of the options; average")] = None


class QuestionsRequest(Parameters, StructureFields, RequestFields, PixelFields):
    """Questions on one image, answered concurrently."""

    questions: Annotated[
        list[
            Annotated[
                Annotated[Text, Tag("(text)")] | Annotated[Question, Tag("(object)")], Discriminator(text_or_object)
            ]
        ],
        Field(min_length=1),
    ]
    system: Text | None = None
    detail: Detail | None = None
    mm_processor_kwargs: ProcessorOptions | None = None
    stream: bool | None = None
    n: Annotated[Any, Neutral("several answers to one question are", 1)] = None
    logprobs: Annotated[Any, Neutral("logprobs of an answer's tokens are", False)] = None
    top_logprobs: Annotated[Any, Neutral("logprobs of an answer's tokens are", 0)] = None


class TextPart(PartFields):
    """Text."""

    type: Literal["text"]
    text: str


class ImageUrl(Body):
    """Where the image is: an https:, http: or data: URL, or "lookonce:IMAGE_ID". `detail` bounds its pixels."""

    url: Text
    detail: Detail | None = None


class ImageUrlPart(PartFields, PixelFields):
    """An image, with bounds of its own as in Qwen's messages. `uuid` is vLLM's: a name for the image by which a later
    request means it, without an `image_url`."""

    type: Literal["image_url"]
    image_url: (
        Annotated[Annotated[Text, Tag("(text)")] | Annotated[ImageUrl, Tag("(object)")], Discriminator(text_or_object)]
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
    """An earlier answer: text, calls or both."""

    role: Literal["assistant"]
    content: TextContent | None = None
    tool_calls: Annotated[list[CalledTool] | None, Field(max_length=128)] = None

    @model_validator(mode="after")
    def _says(self) -> AssistantMessage:
        if self.content is None and not self.tool_calls:
            raise ValueError("'content' is required, or 'tool_calls'")
        return self


class ToolMessage(MessageFields):
    """What a call returned."""

    role: Literal["tool"]
    tool_call_id: CallId
    content: TextContent


AnyMessage = Annotated[
    Annotated[SystemMessage, Tag("(system)")]
    | Annotated[SystemMessage, Tag("(developer)")]
    | Annotated[UserMessage, Tag("(user)")]
    | Annotated[AssistantMessage, Tag("(assistant)")]
    | Annotated[ToolMessage, Tag("(tool)")],
    by_field("role", "system", "developer", "user", "assistant", "tool", others="no other role is supported"),
]


class StreamOptions(Body):
    """Whether the last chunk tells the usage, and whether each chunk tells it so far (vLLM's)."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Annotated[Any, Neutral("obfuscation is", False)] = None


class ChatRequest(Sampling, StructureFields, ToolFields, RequestFields):
    """POST /v1/chat/completions."""

    model: Annotated[str, Field(max_length=512)] | None = None
    messages: Annotated[list[AnyMessage], Field(min_length=1, max_length=1024)]
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    mm_processor_kwargs: ProcessorOptions | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    add_generation_prompt: Annotated[bool | None, Field(description="false: without the header of an answer")] = None
    continue_final_message: Annotated[bool | None, Field(description="go on within the last answer's text")] = None
    chat_template_kwargs: Annotated[
        dict[str, Any] | None, Field(max_length=64, description="further variables of the model's chat template")
    ] = None
    image_first: Annotated[
        bool | None,
        Field(description="lay the images of the only user's turn before its text: their KV is then shared"),
    ] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


def template_of(body: ChatRequest) -> language_pb2.TemplateOptions | None:
    """The wire form of how the prompt is rendered; None: as ever. Raises INVALID_ARGUMENT for contradictions."""
    if body.continue_final_message and body.add_generation_prompt:
        text = "'continue_final_message' goes on without a header: leave out 'add_generation_prompt'"
        raise invalid(text, param="add_generation_prompt")
    header = body.add_generation_prompt is not False
    if header and not body.continue_final_message and not body.chat_template_kwargs:
        return None
    return language_pb2.TemplateOptions(
        arguments=orjson.dumps(body.chat_template_kwargs).decode() if body.chat_template_kwargs else "",
        no_header=not header,
        continue_last_message=bool(body.continue_final_message),
    )


def _form(value: Any) -> str:
    """Which of the three forms of `input` is meant."""
    if not isinstance(value, list):
        return "(text)"
    return "(parts)" if value and isinstance(value[0], dict) else "(texts)"


Part = Annotated[
    Annotated[TextPart, Tag("(text)")] | Annotated[ImageUrlPart, Tag("(image_url)")],
    by_field("type", "text", "image_url", others="nothing else can be moderated"),
]


class ModerationRequest(Body):
    """POST /v1/moderations. A string: one result; a list of strings: one result each; a list of parts (text and
    images): one result for all of them together."""

    input: Annotated[
        Annotated[Text, Tag("(text)")]
        | Annotated[list[Text], Field(min_length=1, max_length=256), Tag("(texts)")]
        | Annotated[list[Part], Field(min_length=1, max_length=256), Tag("(parts)")],
        Discriminator(_form),
    ]
    model: Annotated[str, Field(max_length=512)] | None = None
