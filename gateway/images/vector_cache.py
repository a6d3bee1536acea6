"""Vectors that an embedding model made of kept images: beside the image in its store, and erased with it.

All of an image lie in one value, so that its key follows from the image alone. Each names the embedding and the model
(weights, prompt form, pooling) that it was made of and by; what was made otherwise is not found.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import orjson
import structlog
from numpy.typing import NDArray

from gateway.images.image_records import ImageRecord, ImageRecords
from gateway.images.image_store import LASTING_SECONDS, StoreOutage, StoreWithSpare

MOST = 4
"""Vectors of one image that are kept, the latest: of different models, or of different sizes of the image."""
_HEAD_BYTES = 4
log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Vector:
    """What a model made of one input."""

    rows: NDArray[np.float32]  # [n, width], each of length 1; n is 1, or the prompt's tokens
    tokens: int  # of the prompt
    image_tokens: int


@dataclass(frozen=True)
class VectorKey:
    """What a vector of an image was made of and by."""

    embedding: bytes  # embedding key
    model: str  # digest: `vector_model` in language.proto


class VectorCache:
    """Of all images."""

    def __init__(self, kept: StoreWithSpare, records: ImageRecords) -> None:
        self._store, self._records = kept.store, records

    async def get(self, record: ImageRecord, key: VectorKey) -> Vector | None:
        """The vector; None when there is none, or the store can't tell."""
        return (await self._load(record)).get(key)

    async def put(self, record: ImageRecord, key: VectorKey, vector: Vector) -> None:
        """Keep the vector for as long as the image, unless that was erased meanwhile."""
        entries = await self._load(record)
        entries.pop(key, None)
        latest = dict([*entries.items(), (key, vector)][-MOST:])
        ttl = min(max(record.expires - time.time(), 1.0), LASTING_SECONDS / 2)
        try:
            await self._store.put(vectors_key(record.digest), _written(latest), ttl=ttl)
            current = await self._records.load(record.digest, fresh=True)
        except StoreOutage:
            return
        if current is None or current.deleted:
            await self._store.delete(vectors_key(record.digest))

    async def _load(self, record: ImageRecord) -> dict[VectorKey, Vector]:
        try:
            value = await self._store.get(vectors_key(record.digest))
        except StoreOutage:
            return {}
        if value is None:
            return {}
        try:
            return dict(_read(value))
        except (ValueError, KeyError, TypeError, AttributeError):
            log.warning("vectors of an image unreadable, made again", image=record.id)
            return {}


def vectors_key(digest: bytes) -> bytes:
    """Where an image's vectors are kept."""
    return b"vectors:" + digest


def _written(entries: dict[VectorKey, Vector]) -> bytes:
    head = orjson.dumps(
        [
            [key.embedding.hex(), key.model, *vector.rows.shape, vector.tokens, vector.image_tokens]
            for key, vector in entries.items()
        ]
    )
    data = (np.ascontiguousarray(vector.rows, dtype="<f4").tobytes() for vector in entries.values())
    return b"".join((len(head).to_bytes(_HEAD_BYTES, "little"), head, *data))


def _read(value: memoryview) -> Iterator[tuple[VectorKey, Vector]]:
    """Raises ValueError and its like for what is no such value."""
    at = _HEAD_BYTES + int.from_bytes(value[:_HEAD_BYTES], "little")
    for embedding, model, rows, width, tokens, image_tokens in orjson.loads(value[_HEAD_BYTES:at]):
        found = np.frombuffer(value, "<f4", rows * width, at).reshape(rows, width)
        at += found.nbytes
        yield VectorKey(bytes.fromhex(embedding), model), Vector(found, tokens, image_tokens)
