"""Between our types and their protobuf messages."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.identity import EmbeddingReference
from protos.lookonce.v1 import common_pb2

DEFAULT_MAX_MESSAGE_BYTES = 64 << 20
CHUNK_BYTES = 1 << 20
INLINE_BYTES = 4 << 20
"""A record up to this size rides in the first message of Encode; a larger one follows in chunks."""


def reference_to_proto(reference: EmbeddingReference) -> common_pb2.ImageReference:
    t, h, w = reference.grid_thw
    return common_pb2.ImageReference(
        key=reference.key,
        fingerprint=reference.fingerprint,
        image_digest=reference.image_digest,
        grid=common_pb2.Grid(t=t, h=h, w=w),
        tokens=reference.tokens,
        width=reference.width,
        height=reference.height,
        record_bytes=reference.record_bytes,
    )


def reference_from_proto(message: common_pb2.ImageReference) -> EmbeddingReference:
    """The reference in a message, unchecked: call `check` before use."""
    return EmbeddingReference(
        key=message.key,
        fingerprint=message.fingerprint,
        image_digest=message.image_digest,
        grid_thw=(message.grid.t, message.grid.h, message.grid.w),
        tokens=message.tokens,
        width=message.width,
        height=message.height,
        record_bytes=message.record_bytes,
    )


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
