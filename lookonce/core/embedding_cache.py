"""Embedding records in a store: parsed and verified on every read, dropped when damaged. Knows nothing of how they
are made."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import structlog

from lookonce.core.errors import RecordError
from lookonce.core.record import EmbeddingRecord, parse_record
from lookonce.core.stores.interface import Store, StoreFailure, StoreMetrics

INLINE_BYTES = 64 * 1024
"""Records up to this size are verified on the event loop (some 20 microseconds); larger ones in a thread."""

log = structlog.get_logger(__name__)


class EmbeddingCache:
    """Records by embedding key (32 bytes) in `store`, which the cache does not close."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.metrics = StoreMetrics("cache", "embeddings")

    async def get(self, key: bytes) -> EmbeddingRecord | None:
        """The record, verified; its tensors are views into the store's bytes. A damaged one, or another key's, is
        deleted, counted, and a miss. Raises StoreFailure where the store is strict and could not tell."""
        value = await self.store.get(key)
        record = None
        if value is not None:
            try:
                inline = value.nbytes <= INLINE_BYTES
                record = parse_record(value, key) if inline else await asyncio.to_thread(parse_record, value, key)
            except RecordError as error:
                log.warning("damaged embedding dropped", key=key.hex(), reason=error.message)
                self.metrics.corrupt()
                await self.store.discard(key, value)
        self.metrics.lookup(record is not None)
        return record

    async def put(self, record: EmbeddingRecord, *, ttl: float | None = None) -> bool:
        """Store `record`. False when the store could not keep it. Raises RecordError when its fields contradict each
        other."""
        size = sum(view.data.nbytes for view in record.tensors.values())
        value = record.serialize() if size <= INLINE_BYTES else await asyncio.to_thread(record.serialize)
        try:
            kept = await self.store.put(record.key, value, ttl=ttl)
        except StoreFailure:  # of a strict store: counted and logged by its breaker
            kept = False
        self.metrics.put(kept)
        return kept

    async def contains(self, key: bytes) -> bool:
        """Whether the store holds something under `key` (not verified)."""
        return await self.store.contains(key)

    async def forget(self, keys: Iterable[bytes]) -> bool:
        """Erase; True only when every key is known to be gone from every tier."""
        gone = True
        for key in keys:
            gone = await self.store.delete(key) and gone
        return gone
