"""Bodies of the image routes and of questions on one image."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from gateway.schemas.body import Body, MaxTokens, Sampling, Stops, StopString, text_or_list, text_or_object
from gateway.schemas.neutral import Neutral, RequestFields

Text = Annotated[str, Field(min_length=1)]
Identifier = Annotated[str, Field(min_length=1, max_length=128)]
Detail = Literal["low", "high", "auto", "original"]
Stop = Annotated[Annotated[StopString, Tag("(text)")] | Annotated[Stops, Tag("(list)")], Discriminator(text_or_list)]


Alias = Annotated[str, Field(min_length=1, max_length=64, description="a name to use in place of the id")]
ImageTtl = Annotated[int, Field(ge=1, le=2**31 - 1, description="seconds to keep the image")]


class ImageChange(Body):
    """How an image is to be kept from now on; what is left out stays as it is."""

    ttl: ImageTtl | None = None
    pinned: Annotated[bool, Field(description="keep it until it is erased")] | None = None
    alias: Alias | None = None


class ImageUpload(ImageChange):
    """An image as base64 (plain, or a data: URL) or by URL; exactly one of the two."""

    data: Text | None = None
    url: Text | None = None


class Parameters(Sampling):
    """What a question may set for itself, and a request for all of its questions."""

    max_tokens: MaxTokens | None = None
    stop: Stop | None = None


class Question(Parameters):
    """One question. With `choices` each choice gets a probability, and no text is written."""

    id: Identifier | None = None
    text: Text
    choices: Annotated[list[Text], Field(min_length=1)] | None = None


class QuestionsRequest(Parameters, RequestFields):
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
    stream: bool | None = None
    n: Annotated[Any, Neutral("several answers to one question are", 1)] = None
    logprobs: Annotated[Any, Neutral("logprobs of an answer's tokens are", False)] = None
    top_logprobs: Annotated[Any, Neutral("logprobs of an answer's tokens are", 0)] = None
