"""The fields of a policy, and what its answers mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from blake3 import blake3
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.identity import canonical_json

MAX_RULES = 256
INPUT = "{input}"
"""In a question: becomes "image" or "text"."""
Severity = Literal["low", "medium", "high", "critical"]
SEVERITIES: tuple[Severity, ...] = ("low", "medium", "high", "critical")
InputType = Literal["image", "text"]
_FOR_PEOPLE = ("name", "description", "audience")
_DIGEST_CONTEXT = "lookonce 2026 moderation policy"

Line = Annotated[str, Field(min_length=1, max_length=2000)]
Pixels = Annotated[int, Field(ge=1)]


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


class Body(BaseModel):
    """No unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ImageSize(Body):
    """Limits of the image as it came, in pixels after EXIF orientation; one that is outside is not asked about."""

    min_width: Pixels | None = None
    min_height: Pixels | None = None
    max_width: Pixels | None = None
    max_height: Pixels | None = None

    def admits(self, width: int, height: int) -> bool:
        """Whether an image of this size is within the limits."""
        return (
            (self.min_width or 0) <= width <= (self.max_width or width)
            and (self.min_height or 0) <= height <= (self.max_height or height)
        )  # fmt: skip


class Rule(Body):
    """One thing to look for."""

    id: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_/-]*$", max_length=64)]
    question: Line  # may hold {input}
    choices: Annotated[tuple[Line, ...], Field(min_length=2, max_length=16)] = ("yes", "no")
    positive: Annotated[tuple[Line, ...], BeforeValidator(_several), Field(min_length=1, max_length=15)] = ("yes",)
    threshold: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    severity: Severity = "medium"
    applies_to: Annotated[tuple[InputType, ...], Field(min_length=1, max_length=2)] = ("image", "text")
    follow_up: Line | None = None  # asked only when the rule fires, answered in words
    follow_up_tokens: Annotated[int, Field(ge=1, le=4096)] = 64
    image_size: ImageSize | None = None  # None: the policy's
    description: Annotated[str, Field(max_length=2000)] = ""  # what counts, for people
    audience: Annotated[str, Field(max_length=2000)] = ""  # whom the rule is for

    @model_validator(mode="after")
    def _agree(self) -> Rule:
        if len(set(self.choices)) != len(self.choices):
            raise ValueError("its choices must differ")
        for choice in self.positive:
            if choice not in self.choices:
                raise ValueError(f"positive is {choice!r}, which is not among its choices {', '.join(self.choices)}")
        if set(self.positive) == set(self.choices):
            raise ValueError("with every choice positive the rule would always fire")
        return self

    def ask(self, kind: InputType) -> str:
        """The question about an input of that kind."""
        return self.question.replace(INPUT, kind)

    def ask_further(self, kind: InputType) -> str:
        """The follow-up question about an input of that kind."""
        return (self.follow_up or "").replace(INPUT, kind)

    def score(self, probabilities: Mapping[str, float]) -> float:
        """The score, 0 to 1: the probability that one of the positive choices is the answer. INTERNAL when a
        choice has none."""
        if not set(self.positive) <= probabilities.keys():
            raise LookonceError(ErrorKind.INTERNAL, "the language service left a choice out")
        return min(1.0, max(0.0, math.fsum(probabilities[choice] for choice in set(self.positive))))

    def fires(self, score: float) -> bool:
        return score >= self.threshold


class Policy(Body):
    """All rules of a deployment, in the order of the file."""

    name: Annotated[str, Field(max_length=200)] = ""
    description: Annotated[str, Field(max_length=2000)] = ""
    system: Annotated[str, Field(max_length=8000)] = ""  # said before every question
    max_pixels: Annotated[int, Field(ge=1)] | None = None  # a larger image is scaled down to this
    image_size: ImageSize | None = None  # of rules that have none of their own
    rules: Annotated[tuple[Rule, ...], Field(min_length=1, max_length=MAX_RULES)]

    @field_validator("rules")
    @classmethod
    def _distinct(cls, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
        seen: set[str] = set()
        for rule in rules:
            if rule.id in seen:
                raise ValueError(f"the id {rule.id!r} is there twice")
            seen.add(rule.id)
        return rules

    def of(self, kind: InputType, size: tuple[int, int] | None = None) -> list[Rule]:
        """The rules that apply to inputs of that kind; `size` is an image's width and height, if known."""
        return [rule for rule in self.rules if kind in rule.applies_to and (size is None or self._admits(rule, size))]

    @property
    def digest(self) -> str:
        """64 hexadecimal characters over all that decides a result; words for people don't count."""
        fields = self.model_dump(mode="json", exclude=set(_FOR_PEOPLE))
        for rule in fields["rules"]:
            for name in _FOR_PEOPLE:
                rule.pop(name, None)
        return str(blake3(canonical_json(fields), derive_key_context=_DIGEST_CONTEXT).hexdigest())

    def _admits(self, rule: Rule, size: tuple[int, int]) -> bool:
        limits = rule.image_size or self.image_size
        return limits is None or limits.admits(*size)
