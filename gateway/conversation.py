"""What is asked, whatever door it came through: turns of text and images, and how to sample."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from gateway.auth import Tenant
from gateway.images.image_records import ImageRecord
from gateway.images.library import Resolved
from lookonce.core.rpc.messages import reference_to_proto
from protos.lookonce.v1 import language_pb2


@dataclass(frozen=True)
class ImagePart:
    """A kept image within a turn, resized within `max_pixels` (None: as the checkpoint does)."""

    record: ImageRecord
    max_pixels: int | None = None
    resolved: Resolved | None = None  # when the image came with the request and has just been encoded
    data: bytes | None = field(default=None, repr=False)  # its file, when it came with the request


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: str  # "system" | "user" | "assistant"
    parts: tuple[str | ImagePart, ...]


@dataclass(frozen=True)
class Caller:
    """Who asks, and for how long they wait."""

    tenant: Tenant
    client: str = ""  # for fairness between clients
    timeout: float = 600.0  # seconds
    background: bool = False  # nobody waits for it: a batch


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question whose choices are scored; nothing is generated."""

    id: str
    turns: tuple[Turn, ...]
    choices: tuple[str, ...]


def images_of(turns: Sequence[Turn]) -> list[ImagePart]:
    """The images of a conversation, in order."""
    return [part for turn in turns for part in turn.parts if isinstance(part, ImagePart)]


def routing_key(turns: Sequence[Turn], salt: bytes) -> bytes:
    """What decides the replica: the images; without any, the first turn (a shared system prompt) and whose it is."""
    images = images_of(turns)
    if images:
        return images[0].record.digest
    first = "".join(part for part in turns[0].parts if isinstance(part, str)) if turns else ""
    return hashlib.sha256(salt + first.encode("utf-8", "surrogatepass")).digest()


def to_messages(turns: Sequence[Turn], resolved: Iterable[Resolved]) -> list[language_pb2.Message]:
    """The wire form; `resolved` gives an embedding for each image, in order (an iterator, those of later turns too)."""
    references = iter(resolved)
    return [
        language_pb2.Message(
            role=turn.role,
            parts=[
                language_pb2.Part(text=part)
                if isinstance(part, str)
                else language_pb2.Part(image=reference_to_proto(next(references).reference))
                for part in turn.parts
            ],
        )
        for turn in turns
    ]
