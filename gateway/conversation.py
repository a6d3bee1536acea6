"""What is asked, whatever door it came through: turns of text and images, and how to sample."""

from __future__ import annotations

from dataclasses import dataclass, field

from gateway.auth import Tenant
from gateway.images.encoder import Resolved
from gateway.images.image_records import ImageRecord
from gateway.images.pixel_bounds import AS_SERVED, PixelBounds


@dataclass(frozen=True)
class ImagePart:
    """A kept image within a turn, resized within `bounds`."""

    record: ImageRecord
    bounds: PixelBounds = AS_SERVED
    resolved: Resolved | None = None  # when the image came with the request and has just been encoded
    data: bytes | None = field(default=None, repr=False)  # its file, when it came with the request


@dataclass(frozen=True)
class ToolCall:
    """A call of a function, with a JSON object."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: str  # "system" | "user" | "assistant" | "tool"
    parts: tuple[str | ImagePart, ...]
    calls: tuple[ToolCall, ...] = ()  # of an earlier answer


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
    special_tokens: bool = False  # that the turns spell are those tokens
