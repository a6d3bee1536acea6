"""Between our types and the contract's messages: records in chunks, and errors with their gRPC codes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from lookonce.core.errors import ErrorKind, LookonceError
from protos.lookonce.v1 import common_pb2

DEFAULT_MAX_MESSAGE_BYTES = 64 << 20
CHUNK_BYTES = 1 << 20
INLINE_BYTES = 4 << 20
"""A record up to this size rides in the first message of Encode; a larger one follows in chunks."""


def chunks(record: bytes | memoryview) -> Iterator[common_pb2.RecordChunk]:
    """A serialized record in pieces of at most CHUNK_BYTES, in order."""
    view = memoryview(record)
    for offset in range(0, len(view), CHUNK_BYTES):
        yield common_pb2.RecordChunk(data=bytes(view[offset : offset + CHUNK_BYTES]), offset=offset, total=len(view))


async def join(pieces: AsyncIterator[common_pb2.RecordChunk], *, max_bytes: int) -> bytes:
    """The record whose pieces arrive in order; EMBEDDING_INVALID on a gap, an early end or a size over `max_bytes`."""
    buffer: bytearray | None = None
    position = 0
    async for piece in pieces:
        if buffer is None:
            if piece.total > max_bytes:
                raise LookonceError(
                    ErrorKind.EMBEDDING_INVALID, f"record of {piece.total} bytes is over the limit of {max_bytes}"
                )
            buffer = bytearray(piece.total)
        if piece.offset != position or position + len(piece.data) > len(buffer):
            raise LookonceError(ErrorKind.EMBEDDING_INVALID, "record pieces are out of order")
        buffer[position : position + len(piece.data)] = piece.data
        position += len(piece.data)
    if buffer is None or position != len(buffer):
        raise LookonceError(ErrorKind.EMBEDDING_INVALID, "record stream ended early")
    return bytes(buffer)


TRAILER = "lookonce-error-bin"
C = grpc.StatusCode
GRPC_CODES: dict[ErrorKind, grpc.StatusCode] = {
    ErrorKind.INVALID_ARGUMENT: C.INVALID_ARGUMENT,
    ErrorKind.UNSUPPORTED: C.INVALID_ARGUMENT,
    ErrorKind.IMAGE_INVALID: C.INVALID_ARGUMENT,
    ErrorKind.IMAGE_TOO_LARGE: C.INVALID_ARGUMENT,
    ErrorKind.PAYLOAD_TOO_LARGE: C.INVALID_ARGUMENT,
    ErrorKind.CONTEXT_LENGTH_EXCEEDED: C.INVALID_ARGUMENT,
    ErrorKind.UNAUTHENTICATED: C.UNAUTHENTICATED,
    ErrorKind.PERMISSION_DENIED: C.PERMISSION_DENIED,
    ErrorKind.NOT_FOUND: C.NOT_FOUND,
    ErrorKind.CONFLICT: C.ABORTED,
    ErrorKind.EMBEDDING_MISSING: C.NOT_FOUND,
    ErrorKind.EMBEDDING_INVALID: C.DATA_LOSS,
    ErrorKind.FINGERPRINT_MISMATCH: C.FAILED_PRECONDITION,
    ErrorKind.CHECKPOINT_INVALID: C.FAILED_PRECONDITION,
    ErrorKind.RATE_LIMITED: C.RESOURCE_EXHAUSTED,
    ErrorKind.OVERLOADED: C.RESOURCE_EXHAUSTED,
    ErrorKind.UNAVAILABLE: C.UNAVAILABLE,
    ErrorKind.DEADLINE_EXCEEDED: C.DEADLINE_EXCEEDED,
    ErrorKind.CANCELLED: C.CANCELLED,
    ErrorKind.INTERNAL: C.INTERNAL,
}
_FOREIGN: dict[grpc.StatusCode, tuple[ErrorKind, str]] = {
    C.INVALID_ARGUMENT: (ErrorKind.INVALID_ARGUMENT, "the service refused the request"),
    C.RESOURCE_EXHAUSTED: (ErrorKind.PAYLOAD_TOO_LARGE, "the message is larger than the service accepts"),
    C.UNAUTHENTICATED: (ErrorKind.UNAUTHENTICATED, "the service wants credentials"),
    C.PERMISSION_DENIED: (ErrorKind.PERMISSION_DENIED, "the service refused the caller"),
    C.DEADLINE_EXCEEDED: (ErrorKind.DEADLINE_EXCEEDED, "the deadline passed"),
    C.CANCELLED: (ErrorKind.UNAVAILABLE, "the service is stopping"),
    C.UNAVAILABLE: (ErrorKind.UNAVAILABLE, "the service cannot be reached"),
}
"""What a status means that was not sent by us (no trailer): connection faults, size limits, deadlines. CANCELLED is
what calls end with that a server's shutdown caught before they began, or that outlast its grace: whoever cancels a
call of his own gets asyncio.CancelledError instead."""


def to_proto(error: LookonceError) -> common_pb2.Error:
    """The error as a message, for trailers and for items of a stream."""
    message = common_pb2.Error(kind=error.kind.name, message=error.message, param=error.param or "")
    if error.retry_after is not None:
        message.retry_after = error.retry_after
    return message


def from_proto(message: common_pb2.Error) -> LookonceError:
    """The error that `to_proto` turned into a message; kinds of a newer peer become INTERNAL."""
    try:
        kind = ErrorKind[common_pb2.ErrorKind.Name(message.kind)]
    except (KeyError, ValueError):
        kind = ErrorKind.INTERNAL
    retry_after = message.retry_after if message.HasField("retry_after") else None
    return LookonceError(kind, message.message, param=message.param or None, retry_after=retry_after)


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: LookonceError) -> NoReturn:
    """End the call with the error's code, text and trailer."""
    trailer = ((TRAILER, to_proto(error).SerializeToString()),)
    await context.abort(GRPC_CODES[error.kind], error.message, trailer)
    raise error  # never reached: abort raises


def from_rpc_error(error: grpc.aio.AioRpcError, service: str) -> LookonceError:
    """What a failed call means to the caller; `service` ("vision service") goes into the text of foreign failures."""
    for name, value in error.trailing_metadata() or ():
        if name == TRAILER and isinstance(value, bytes):
            try:
                return from_proto(common_pb2.Error.FromString(value))
            except DecodeError:
                break
    kind, text = _FOREIGN.get(error.code(), (ErrorKind.INTERNAL, "the service failed"))
    return LookonceError(
        kind, text.replace("the service", f"the {service}"), retry_after=1.0 if kind is ErrorKind.UNAVAILABLE else None
    )
