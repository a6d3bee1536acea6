"""What the client returns. Fields that a newer gateway adds are ignored, those that an older one lacks are None."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar, cast

from lookonce.client.exceptions import ApiError, api_error
from lookonce.client.request_options import PixelOptions, QuestionOptions

Json = Mapping[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one answer. `cached_tokens` of the prompt were in the KV cache already; `image_tokens` are those of
    images."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int = 0
    image_tokens: int = 0

    @classmethod
    def of(cls, json: Json) -> Usage:
        return _made(cls, {**json, **(json.get("prompt_tokens_details") or {})})


@dataclass(frozen=True, slots=True)
class Receipt:
    """What an answer reused and what it cost; times are milliseconds.

    `embedding`: "hit" (kept from before), "coalesced" (encoded together with another request), "miss" (encoded for
    this one), None without an image. `prefix`: whether the KV cache of the image was there.
    """

    embedding: Literal["hit", "miss", "coalesced"] | None
    prefix: Literal["hit", "miss"]
    encode_ms: float = 0.0
    prefill_tokens: int = 0
    cached_tokens: int = 0
    queue_ms: float = 0.0
    ttft_ms: float = 0.0
    model: str = ""
    fingerprint: str = ""

    @classmethod
    def of(cls, json: Json) -> Receipt:
        return _made(cls, {"embedding": None, **json})


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer; `str(answer)` is its text.

    With choices, `choices` are their probabilities (they sum to 1), `logprobs` the logarithms of what each has under
    the model, and `text` is the likeliest. Of other types of questions `value` is whether it is so, the expected value
    on a scale, the labels that hold, or what JSON says; `probability` that of yes, `labels` those of labels. Of
    `ask_many`, one that failed has `error`, an empty text and nothing else.
    """

    text: str
    finish_reason: str | None = None
    usage: Usage | None = None
    receipt: Receipt | None = None
    choices: dict[str, float] | None = None
    logprobs: dict[str, float] | None = None
    id: str | None = None
    type: str | None = None
    value: Any = None
    probability: float | None = None
    labels: dict[str, float] | None = None
    prompts: int | None = None
    error: ApiError | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return self.text

    @property
    def ok(self) -> bool:
        return self.error is None


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What the gateway knows of an image. `tokens` is how many embeddings it has; `cached` and `encode_ms` tell, right
    after an upload, whether its embedding was known and what encoding took."""

    id: str
    bytes: int = 0
    width: int | None = None
    height: int | None = None
    tokens: int | None = None
    status: str = ""
    created_at: datetime | None = None
    expires_at: datetime | None = None
    cached: bool | None = None
    encode_ms: float | None = None

    @classmethod
    def of(cls, json: Json) -> ImageInfo:
        times = {name: _time(json.get(name)) for name in ("created_at", "expires_at")}
        return _made(cls, {**json, **times})


@dataclass(frozen=True, slots=True)
class Erasure:
    """An image that was erased. `complete` is false while a process has yet to confirm; erasure then goes on."""

    id: str
    complete: bool


@dataclass(frozen=True, slots=True)
class Model:
    """A model that is served."""

    id: str
    created_at: datetime | None
    owned_by: str

    @classmethod
    def of(cls, json: Json) -> Model:
        return cls(json["id"], _time(json.get("created")), json.get("owned_by", ""))


@dataclass(frozen=True, slots=True)
class Moderation:
    """A verdict by the categories of the gateway's policy. `scores` are probabilities, `applied` says which kinds of
    input ("image", "text") a category was held against, `severity` is the highest of what is flagged."""

    flagged: bool
    categories: dict[str, bool]
    scores: dict[str, float]
    applied: dict[str, list[str]]
    severity: str | None = None
    follow_ups: dict[str, list[str]] = field(default_factory=dict)
    receipt: Receipt | None = None

    @classmethod
    def of(cls, json: Json) -> Moderation:
        """From one of the results of the API's moderation object."""
        return cls(
            json["flagged"],
            json["categories"],
            json["category_scores"],
            json.get("category_applied_input_types", {}),
            json.get("severity"),
            json.get("follow_ups", {}),
            Receipt.of(json["receipt"]) if json.get("receipt") else None,
        )


def answer_of(json: Json) -> Answer:
    """From one of the answers of the questions route."""
    if json.get("error"):
        return Answer("", id=json.get("id"), error=api_error(json["error"]))
    return _made(Answer, {**json, **_accounts(json), "error": None})


def completion_of(json: Json) -> Answer:
    """From the API's chat completion: its first choice."""
    choice = json["choices"][0]
    text = choice["message"]["content"] or ""
    return Answer(text, choice.get("finish_reason"), **_accounts(json), id=json.get("id"))


def _accounts(json: Json) -> dict[str, Any]:
    return {
        "usage": Usage.of(json["usage"]) if json.get("usage") else None,
        "receipt": Receipt.of(json["receipt"]) if json.get("receipt") else None,
    }


def _made(kind: type[T], json: Json) -> T:
    """A dataclass of the fields that are there."""
    return kind(**{field.name: json[field.name] for field in fields(cast(Any, kind)) if field.name in json})


def _time(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


class ImageBase:
    """What the gateway told of the image last."""

    def __init__(self, info: ImageInfo, bounds: PixelOptions) -> None:
        self._info = info
        self.bounds = bounds
        """Within which it is looked at, unless a question has others."""

    def _within(self, options: QuestionOptions) -> QuestionOptions:
        """The options of a question, within the bounds where it has none."""
        return {**self.bounds, **options}

    def __repr__(self) -> str:
        size = f"{self.width}x{self.height}, {self.tokens} tokens"
        return f"{type(self).__name__}({self.id!r}, {size})"

    @property
    def info(self) -> ImageInfo:
        """All of it."""
        return self._info

    @property
    def id(self) -> str:
        """Made from the bytes and the tenant: the same file has the same id."""
        return self._info.id

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return self._info.bytes

    @property
    def width(self) -> int | None:
        """In pixels."""
        return self._info.width

    @property
    def height(self) -> int | None:
        """In pixels."""
        return self._info.height

    @property
    def tokens(self) -> int | None:
        """How many embeddings stand for the image in a prompt."""
        return self._info.tokens

    @property
    def status(self) -> str:
        """ "ready" when it can be asked about."""
        return self._info.status

    @property
    def created_at(self) -> datetime | None:
        """First upload."""
        return self._info.created_at

    @property
    def expires_at(self) -> datetime | None:
        """When it is forgotten unless uploaded again."""
        return self._info.expires_at

    @property
    def cached(self) -> bool | None:
        """Whether the upload found the embedding there; None if it was not uploaded but looked up."""
        return self._info.cached

    @property
    def encode_ms(self) -> float | None:
        """What encoding took at the upload, in milliseconds."""
        return self._info.encode_ms
