"""OpenAI's moderations: the request, and what the API answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from gateway.schemas.body import Body, by_field
from gateway.schemas.chat_bodies import ImageUrlPart, TextPart
from gateway.schemas.responses import Answered

Text = Annotated[str, Field(min_length=1)]


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


class ModerationResult(Answered):
    """The verdict on one input. Maps have the policy's category ids as keys."""

    flagged: bool = Field(description="whether any category is")
    categories: dict[str, bool]
    category_scores: dict[str, float] = Field(description="probability of the category's positive choices")
    category_applied_input_types: dict[str, list[Literal["image", "text"]]]
    severity: Literal["low", "medium", "high", "critical"] | None = Field(description="the highest that is flagged")
    follow_ups: dict[str, list[str]] = Field(description="answers to the follow-up questions of flagged categories")
    receipt: dict[str, Any] | None = Field(description="as in chat completions, over all calls for this result")


class ModerationObject(Answered):
    """OpenAI's moderation object."""

    id: str
    model: str
    results: list[ModerationResult]
