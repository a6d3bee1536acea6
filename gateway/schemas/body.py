"""What request bodies have in common: strict models, unions that tell their members apart by looking, so that an error
speaks of the member that was meant, and sampling parameters.

Tags of members are in parentheses: pydantic puts them into the location of an error; gateway.http.route leaves them out
again.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema

from protos.lookonce.v1 import language_pb2

UNKNOWN = "unknown "
"""Begins the type of the error about a string that no member has; the field's name follows."""
MEMBER = "member"
"""The type of an error whose context holds a `text` that follows the field's name."""
MaxTokens = Annotated[int, Field(ge=1, lt=2**32)]
MinTokens = Annotated[int, Field(ge=0, lt=2**32)]
Pixels = Annotated[int, Field(ge=1, le=2**31 - 1)]
Temperature = Annotated[float, Field(ge=0.0, le=2.0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
TopP = Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)]
TopK = Annotated[int, Field(ge=-1, le=1_000_000, description="0 or -1: all")]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0, allow_inf_nan=False)]
RepetitionPenalty = Annotated[float, Field(gt=0.0, le=10.0, allow_inf_nan=False)]
SkipSpecial = Annotated[
    bool, Field(description="false: special tokens that messages spell are tokens, and the answer's are in its text")
]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
MAX_STOPS = 16
Stops = Annotated[list[StopString], Field(max_length=MAX_STOPS)]
TokenId = Annotated[int, Field(ge=0, lt=2**32)]
TokenIds = Annotated[list[TokenId], Field(max_length=4096)]
AllowedIds = Annotated[list[TokenId], Field(min_length=1, max_length=4096, description="no other token is drawn")]
BadWords = Annotated[list[StopString], Field(max_length=64, description="none of them is written")]
Bias = Annotated[float, Field(ge=-100.0, le=100.0, allow_inf_nan=False)]
LogitBias = Annotated[
    dict[Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")], Bias],
    Field(max_length=4096, description="added to the logits of tokens, by their ids as strings"),
]
SMALLEST = 2.0**-126
"""The least number above 0 on the wire (float32): a smaller one would arrive as 0, which is refused."""


def _fail_fast(schema: Any) -> None:
    """An error takes far longer to make than an item to send: lists end at their first one."""
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            schema["fail_fast"] = True
        for part in schema.values():
            _fail_fast(part)
    elif isinstance(schema, list | tuple):
        for part in schema:
            _fail_fast(part)


class Body(BaseModel):
    """Base of request bodies: exact types, no unknown fields; a list's first fault is told."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _fail_fast(schema)
        return schema


def text_or_list(value: Any) -> str:
    """For `str | list[...]`: which of the two is meant."""
    return "(list)" if isinstance(value, list) else "(text)"


def text_or_object(value: Any) -> str:
    """For `str | Model`."""
    return "(text)" if isinstance(value, str) else "(object)"


def by_field(name: str, *known: str, others: str) -> Discriminator:
    """For models told apart by the string in one field, tagged with the known strings. `others` says what becomes of
    other strings: "... are not supported"."""

    def tag(value: Any) -> str | None:
        found = value.get(name) if isinstance(value, dict) else None
        return f"({found})" if found in known else None

    listed = ", ".join(f"'{item}'" for item in known[:-1]) + f" or '{known[-1]}'"
    return Discriminator(tag, custom_error_type=f"{UNKNOWN}{name}", custom_error_message=f"must be {listed}: {others}")


class PixelFields(Body):
    """How many pixels an image has once it is resized. Unset: the service's own bounds."""

    min_pixels: Annotated[Pixels, Field(description="fewest pixels of the resized image")] | None = None
    max_pixels: Annotated[Pixels, Field(description="most pixels of the resized image")] | None = None


class Sampling(Body):
    """What all doors share. Unset: the model's own default (`sampling_defaults` in /v1/models), or greedy."""

    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: Probability | None = None
    repetition_penalty: RepetitionPenalty | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Seed | None = None
    ignore_eos: bool | None = None  # go on to max_tokens: for benchmarks
    min_tokens: MinTokens | None = None
    skip_special_tokens: SkipSpecial | None = None
    logit_bias: LogitBias | None = None
    stop_token_ids: TokenIds | None = None
    bad_words: BadWords | None = None
    allowed_token_ids: AllowedIds | None = None


def to_sampling(
    params: Sampling,
    *,
    max_tokens: int | None,
    stop: list[str],
    defaults: Sampling | None = None,
    logprobs: int | None = None,
    n: int = 1,
    structure: language_pb2.Structure | None = None,
) -> language_pb2.SamplingParameters:
    """The wire form; a parameter that `params` leaves out comes from `defaults`."""
    fields: dict[str, Any] = {}
    for name in Sampling.model_fields.keys() - {"skip_special_tokens"}:
        value = getattr(params, name)
        if value is None and defaults is not None:
            value = getattr(defaults, name)
        if value is not None:
            fields[name] = value
    for name in ("top_p", "repetition_penalty"):
        if name in fields:
            fields[name] = max(fields[name], SMALLEST)
    if "top_k" in fields:
        fields["top_k"] = max(fields["top_k"], 0)
    if "logit_bias" in fields:
        fields["logit_bias"] = {int(token): value for token, value in fields["logit_bias"].items()}
    if "seed" in fields:
        fields["seed"] = int(fields["seed"]) % 2**64
    fields["special_tokens"] = special_tokens(params, defaults)
    return language_pb2.SamplingParameters(
        **fields,
        max_tokens=max_tokens,
        stop=stop,
        logprobs=logprobs,
        n=n,
        structure=structure,
    )


def special_tokens(params: Sampling, defaults: Sampling | None = None) -> bool:
    """Whether special tokens are let through."""
    wished = params.skip_special_tokens
    if wished is None and defaults is not None:
        wished = defaults.skip_special_tokens
    return wished is False


def stop_list(stop: str | list[str] | None) -> list[str]:
    """OpenAI's `stop` as a list."""
    if stop is None:
        return []
    return [stop] if isinstance(stop, str) else stop
