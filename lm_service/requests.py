"""From protobuf to our types: every field checked, every refusal naming the field and its limit."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lm_service.engine.types import Sampling
from lm_service.prompt import Message
from lookonce.core.errors import ErrorKind, LookonceError, invalid
from lookonce.core.identity import DIGEST_BYTES, EmbeddingReference
from lookonce.core.rpc.messages import reference_from_proto
from protos.lookonce.v1 import common_pb2, language_pb2

MAX_MESSAGES = 1024
MAX_PARTS = 4096
MAX_TEXT_CHARACTERS = 4_000_000
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_LOGPROBS = 20
MAX_ANSWERS = 16
MAX_ITEMS = 1024
MAX_CHOICES = 64
MAX_CHOICE_CHARACTERS = 1024
MAX_ID_CHARACTERS = 256
MAX_FORGOTTEN = 10_000
SALT_BYTES = 32


def messages_of(
    messages: Sequence[language_pb2.Message],
    where: str = "messages",
    known: dict[bytes, EmbeddingReference] | None = None,
) -> list[Message]:
    """A conversation, its size bounded; its content is checked by PromptBuilder. Images that stand in `known`, by their
    serialised form, are not read again; new ones are added."""
    if len(messages) > MAX_MESSAGES:
        raise invalid(f"{where} may hold {MAX_MESSAGES} messages, got {len(messages)}", param=where)
    parts = sum(len(message.parts) for message in messages)
    if parts > MAX_PARTS:
        raise invalid(f"{where} may hold {MAX_PARTS} parts, got {parts}", param=where)
    known = {} if known is None else known
    read = [Message(message.role, _parts(message.parts, where, i, known)) for i, message in enumerate(messages)]
    characters = sum(len(part) for message in read for part in message.parts if isinstance(part, str))
    if characters > MAX_TEXT_CHARACTERS:
        raise LookonceError(
            ErrorKind.PAYLOAD_TOO_LARGE,
            f"{where} may hold {MAX_TEXT_CHARACTERS} characters, got {characters}",
            param=where,
        )
    return read


def _parts(
    parts: Sequence[language_pb2.Part], where: str, at: int, known: dict[bytes, EmbeddingReference]
) -> tuple[str | EmbeddingReference, ...]:
    read: list[str | EmbeddingReference] = []
    for number, part in enumerate(parts):
        kind = part.WhichOneof("content")
        if kind == "text":
            read.append(part.text)
        elif kind == "image":
            read.append(_reference(part.image, known))
        else:
            place = f"{where}[{at}].parts[{number}]"
            raise invalid(f"{place} holds neither text nor an image", param=place)
    return tuple(read)


def _reference(image: common_pb2.ImageReference, known: dict[bytes, EmbeddingReference]) -> EmbeddingReference:
    serialised = image.SerializeToString()
    found = known.get(serialised)
    if found is None:
        found = known[serialised] = reference_from_proto(image)
    return found


def sampling_of(wanted: language_pb2.SamplingParameters, *, max_tokens: int) -> Sampling:
    """Sampling parameters within their bounds. `max_tokens` is the service's bound and default: who asks for more gets
    so many, as whoever asks for more than the context leaves."""

    def number(name: str, default: float, low: float, high: float, *, above: bool = False) -> float:
        if not wanted.HasField(name):
            return default
        value = float(getattr(wanted, name))
        if math.isnan(value) or not low <= value <= high or (above and value == low):
            bounds = f"above {low:g} and at most {high:g}" if above else f"from {low:g} to {high:g}"
            raise invalid(f"{name} must be {bounds}, got {value:g}", param=name)
        return value

    if wanted.HasField("max_tokens"):
        if wanted.max_tokens < 1:
            raise invalid("max_tokens must be at least 1, got 0", param="max_tokens")
        if wanted.min_tokens > wanted.max_tokens:
            text = f"min_tokens must be at most max_tokens, {wanted.max_tokens}, got {wanted.min_tokens}"
            raise invalid(text, param="min_tokens")
        max_tokens = min(wanted.max_tokens, max_tokens)

    return Sampling(
        max_tokens=max_tokens,
        temperature=number("temperature", 0.0, 0.0, 2.0),
        top_p=number("top_p", 1.0, 0.0, 1.0, above=True),
        top_k=wanted.top_k,
        min_p=number("min_p", 0.0, 0.0, 1.0),
        repetition_penalty=number("repetition_penalty", 1.0, 0.0, 10.0, above=True),
        presence_penalty=number("presence_penalty", 0.0, -2.0, 2.0),
        frequency_penalty=number("frequency_penalty", 0.0, -2.0, 2.0),
        seed=wanted.seed if wanted.HasField("seed") else None,
        stop=_stops(wanted.stop),
        ignore_eos=wanted.ignore_eos,
        logprobs=_whole(wanted, "logprobs", 0, MAX_LOGPROBS) if wanted.HasField("logprobs") else None,
        n=_whole(wanted, "n", 1, MAX_ANSWERS) if wanted.n else 1,
        min_tokens=wanted.min_tokens,
    )


def _whole(wanted: language_pb2.SamplingParameters, name: str, low: int, high: int) -> int:
    value = int(getattr(wanted, name))
    if not low <= value <= high:
        raise invalid(f"{name} must be from {low} to {high}, got {value}", param=name)
    return value


def _stops(stops: Sequence[str]) -> tuple[str, ...]:
    if len(stops) > MAX_STOPS:
        raise invalid(f"stop may hold {MAX_STOPS} strings, got {len(stops)}", param="stop")
    for i, stop in enumerate(stops):
        if not 1 <= len(stop) <= MAX_STOP_CHARACTERS:
            raise invalid(
                f"stop[{i}] must have 1 to {MAX_STOP_CHARACTERS} characters, got {len(stop)}", param=f"stop[{i}]"
            )
    return tuple(stops)


def choices_of(item: language_pb2.ScoreItem) -> tuple[str, ...]:
    """The choices of an item: at least one, none empty, no two alike."""
    choices = tuple(item.choices)
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise invalid(f"choices must be 1 to {MAX_CHOICES} strings, got {len(choices)}", param="choices")
    for i, choice in enumerate(choices):
        if not 1 <= len(choice) <= MAX_CHOICE_CHARACTERS:
            raise invalid(
                f"choices[{i}] must have 1 to {MAX_CHOICE_CHARACTERS} characters, got {len(choice)}",
                param=f"choices[{i}]",
            )
    if len(set(choices)) != len(choices):
        raise invalid("choices must differ from each other", param="choices")
    return choices


def check_items(items: Sequence[language_pb2.ScoreItem]) -> None:
    """Raise unless there are 1 to MAX_ITEMS items, of no more text than one conversation may have."""
    if not 1 <= len(items) <= MAX_ITEMS:
        raise invalid(f"items must be 1 to {MAX_ITEMS}, got {len(items)}", param="items")
    characters = sum(
        sum(map(len, item.choices)) + sum(len(part.text) for message in item.messages for part in message.parts)
        for item in items
    )
    if characters > MAX_TEXT_CHARACTERS:
        raise LookonceError(
            ErrorKind.PAYLOAD_TOO_LARGE,
            f"items may hold {MAX_TEXT_CHARACTERS} characters in all, got {characters}: ask in several calls",
            param="items",
        )


def check_ids(request: language_pb2.GenerateRequest | language_pb2.ScoreRequest) -> None:
    """Raise when an opaque name is longer than any client needs, or the salt is not of its size."""
    for name in ("request_id", "client"):
        if len(getattr(request, name)) > MAX_ID_CHARACTERS:
            raise invalid(f"{name} may have {MAX_ID_CHARACTERS} characters", param=name)
    if len(request.cache_salt) not in (0, SALT_BYTES):
        raise invalid(
            f"cache_salt must be {SALT_BYTES} bytes or empty, got {len(request.cache_salt)}", param="cache_salt"
        )


def timeout_of(
    request: language_pb2.GenerateRequest | language_pb2.ScoreRequest, remaining: float | None, longest: float
) -> float:
    """Seconds the request may take: the least of its own wish, of the call's deadline and of the service's cap."""
    wish = request.timeout if request.HasField("timeout") else longest
    if not 0 < wish < math.inf:
        raise invalid(f"timeout must be a number of seconds above 0, got {wish:g}", param="timeout")
    return min(wish, longest, math.inf if remaining is None else remaining)


def check_forget(request: common_pb2.ForgetRequest) -> None:
    """Raise unless keys and digests are 32 bytes each and not too many."""
    for name in ("keys", "image_digests"):
        values = getattr(request, name)
        if len(values) > MAX_FORGOTTEN:
            raise invalid(f"{name} may hold {MAX_FORGOTTEN} entries, got {len(values)}", param=name)
        if any(len(value) != DIGEST_BYTES for value in values):
            raise invalid(f"{name} must be {DIGEST_BYTES} bytes each", param=name)
