"""Bodies of POST /v1/systemone, as servers and clients of that API have them: a state, and typed questions about it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, Tag

from gateway.schemas.body import Body, by_field
from gateway.schemas.neutral import Hint, Neutral
from gateway.schemas.responses import Answered, Receipt

Content = Annotated[Any, Field(description="a text, or an object or list whose strings are")]
Name = Annotated[str, Field(min_length=1, max_length=512)]


class NoulCriteria(Body):
    """What counts as yes, and what as no."""

    true: Content = None
    false: Content = None


class NoulQuestion(Body):
    """Yes or no."""

    type: Literal["noul"]
    instructions: Content = None
    criteria: NoulCriteria | None = None


class ChoiceQuestion(Body):
    """One of several, each with a description or null."""

    type: Literal["choice"]
    instructions: Content = None
    criteria: Annotated[dict[Name, Content], Field(min_length=1, max_length=64)]


class ScoreQuestion(Body):
    """A level, counted from 0, of those described."""

    type: Literal["score"]
    instructions: Content = None
    criteria: Annotated[list[Content], Field(min_length=1, max_length=64)]


AnyQuestion = Annotated[
    Annotated[NoulQuestion, Tag("(noul)")]
    | Annotated[ChoiceQuestion, Tag("(choice)")]
    | Annotated[ScoreQuestion, Tag("(score)")],
    by_field("type", "noul", "choice", "score", others="boxes are not supported"),
]


class Asset(Body):
    """An image, as base64 or, in a form, as the part of that name."""

    type: Literal["image"] | None = None
    format: Hint | None = None
    data_base64: str | None = None
    part: Hint | None = None


class Options(Body):
    """Of other servers of this API."""

    return_logits: bool | None = None
    temperature_scaling: bool | None = None  # none is done
    assistant_prefix: Annotated[Any, Neutral("a prefix of the answer is", "")] = None


class SystemOneRequest(Body):
    """Typed questions about one state. A name of `assets` within a string of the state, of instructions or criteria
    stands for that image; images that no string names come first. `model` may be any."""

    model: Annotated[str, Field(max_length=512)] | None = None
    state: Content
    questions: Annotated[dict[Name, AnyQuestion], Field(min_length=1, max_length=256)]
    assets: Annotated[dict[Name, Asset] | None, Field(max_length=64)] = None
    options: Options | None = None


class SystemOneUsage(Answered):
    """Tokens of all prompts. Nothing is generated."""

    input_tokens: int
    output_tokens: int


class SystemOneResponse(Answered):
    """An answer for each question: `noul` the probability of yes; `choice`, `confidence` and `probabilities`; `score`
    the expected level with its `legend`."""

    model: str
    answers: dict[str, dict[str, Any]]
    usage: SystemOneUsage
    receipt: Receipt
