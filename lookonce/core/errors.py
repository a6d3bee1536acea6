"""The one error taxonomy. Knows nothing of gRPC or HTTP: two tables at the edges translate it."""

from __future__ import annotations

from enum import StrEnum


class ErrorKind(StrEnum):
    """Machine-readable kind of a failure. Names equal those of `ErrorKind` in common.proto."""

    INVALID_ARGUMENT = "invalid_argument"
    UNSUPPORTED = "unsupported"
    IMAGE_INVALID = "image_invalid"
    IMAGE_TOO_LARGE = "image_too_large"
    PAYLOAD_TOO_LARGE = "payload_too_large"
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    UNAUTHENTICATED = "unauthenticated"
    PERMISSION_DENIED = "permission_denied"
    NOT_FOUND = "not_found"
    CONFLICT = "conflict"
    EMBEDDING_MISSING = "embedding_missing"
    EMBEDDING_INVALID = "embedding_invalid"
    FINGERPRINT_MISMATCH = "fingerprint_mismatch"
    CHECKPOINT_INVALID = "checkpoint_invalid"
    RATE_LIMITED = "rate_limited"
    OVERLOADED = "overloaded"
    UNAVAILABLE = "unavailable"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    CANCELLED = "cancelled"
    INTERNAL = "internal"


class LookonceError(Exception):
    """A failure whose text may be shown to a client: `message` is ours, never a library's.

    `param` names the request field at fault; `retry_after` is in seconds.
    """

    def __init__(
        self, kind: ErrorKind, message: str, *, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.param = param
        self.retry_after = retry_after

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.kind.value}, {self.message!r})"


def invalid(message: str, *, param: str | None = None) -> LookonceError:
    """A request that can never succeed as it stands; `message` names the field and the limit."""
    return LookonceError(ErrorKind.INVALID_ARGUMENT, message, param=param)


class CheckpointError(LookonceError):
    """A checkpoint that cannot be used; each of `problems` names the file or tensor at fault and the remedy.

    The message is the problem itself, or a list of them, one a line.
    """

    def __init__(self, *problems: str) -> None:
        listed = [f"{len(problems)} problems", *(f"  - {problem}" for problem in problems)]
        super().__init__(ErrorKind.CHECKPOINT_INVALID, problems[0] if len(problems) == 1 else "\n".join(listed))
        self.problems = problems


class RecordError(LookonceError):
    """Bytes that are not a valid embedding record (malformed, truncated, failed checksum)."""

    def __init__(self, message: str) -> None:
        super().__init__(ErrorKind.EMBEDDING_INVALID, message)
