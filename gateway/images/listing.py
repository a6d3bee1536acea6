"""Which images a tenant has: an index in the image store, in buckets, so that an upload rewrites a small part of it.

The index is a hint: what it names is looked up before it is shown, and what is gone is dropped from it on the way.
Buckets are rewritten under a lease, so that gateways that share a store don't undo each other's entries.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import orjson
import structlog
from blake3 import blake3

from gateway.images.image_records import ImageRecord, ImageRecords
from gateway.images.image_store import PINNED_SECONDS, StoreOutage, StoreWithSpare
from lookonce.core.stores.interface import leased

BUCKETS = 64
LOADED_AT_ONCE = 32
log = structlog.get_logger(__name__)
Entries = dict[str, float]  # digests in hexadecimal, with when the image was made (Unix seconds)


@dataclass(frozen=True)
class Page:
    """Images, newest first; whether there are more after them."""

    records: list[ImageRecord]
    has_more: bool


class Listing:
    """The indexes of all tenants."""

    def __init__(self, kept: StoreWithSpare, records: ImageRecords) -> None:
        self._kept = kept
        self._records = records
        self._locks = [asyncio.Lock() for _ in range(BUCKETS)]

    async def add(self, record: ImageRecord) -> None:
        """Have the image listed. Costs one read when it is already."""
        digest = record.digest.hex()
        try:
            listed = (await self._read(record.tenant, _bucket(digest))).get(digest)
        except StoreOutage:
            listed = None
        if listed != record.created:
            await self._change(record.tenant, _bucket(digest), lambda entries: entries | {digest: record.created})

    async def remove(self, tenant: str, digests: Iterable[str]) -> None:
        """Have these images listed no more."""
        gone = set(digests)
        for bucket in {_bucket(digest) for digest in gone}:
            await self._change(tenant, bucket, lambda entries: {k: v for k, v in entries.items() if k not in gone})

    async def page(self, tenant: str, *, limit: int, after: ImageRecord | None = None) -> Page:
        """At most `limit` images made before `after`, or the newest ones. Raises StoreOutage without the store."""
        found = await asyncio.gather(*(self._read(tenant, bucket) for bucket in range(BUCKETS)))
        places = sorted(((-made, digest) for entries in found for digest, made in entries.items()))
        if after is not None:
            start = (-after.created, after.digest.hex())
            places = [place for place in places if place > start]
        records: list[ImageRecord] = []
        gone: list[str] = []
        while places and len(records) <= limit:
            some, places = places[:LOADED_AT_ONCE], places[LOADED_AT_ONCE:]
            loaded = await asyncio.gather(*(self._records.load(bytes.fromhex(digest)) for _, digest in some))
            for (_, digest), record in zip(some, loaded, strict=True):
                if record is None or record.deleted or record.tenant != tenant:
                    gone.append(digest)
                else:
                    records.append(record)
        if gone:
            await self.remove(tenant, gone)
        return Page(records[:limit], len(records) > limit)

    async def _read(self, tenant: str, bucket: int) -> Entries:
        key = _key(tenant, bucket)
        return _parse(await self._kept.store.get(key)) | _parse(await self._kept.spare.get(key))

    async def _change(self, tenant: str, bucket: int, change: Callable[[Entries], Entries]) -> None:
        key, spare = _key(tenant, bucket), self._kept.spare
        async with self._locks[bucket], leased(self._kept.store, key):
            try:
                entries = change(await self._read(tenant, bucket))
            except StoreOutage:  # the store's own entries are joined with these when it is back
                entries = change(_parse(await spare.get(key)))
                await spare.put(key, orjson.dumps(entries), ttl=PINNED_SECONDS)
            else:
                await self._kept.put(key, orjson.dumps(entries), ttl=PINNED_SECONDS)


def _parse(value: memoryview | None) -> Entries:
    if value is None:
        return {}
    try:
        entries = orjson.loads(value)
        return {str(digest): float(made) for digest, made in entries.items() if len(bytes.fromhex(digest)) == 32}
    except (ValueError, TypeError, AttributeError):
        log.warning("index of images unreadable, begun anew")
        return {}


def _bucket(digest: str) -> int:
    return int(digest[:2], 16) % BUCKETS


def _key(tenant: str, bucket: int) -> bytes:
    return b"index:" + blake3(tenant.encode()).digest() + bytes([bucket])
