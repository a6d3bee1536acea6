"""Which images a tenant has, and the names it gave them: both in the image store.

The list is a hint: what it names is looked up before it is shown, and what is gone is dropped from it on the way. It
lies in buckets, so that an upload rewrites a small part of it. They are rewritten under a lease, so that gateways that
share a store don't undo each other's entries.

A name never becomes a key as it is: it is hashed together with its tenant. It points at one making of an image, so that
erasing the image ends it in every case.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import orjson
import structlog
from blake3 import blake3

from gateway.images.image_records import ImageRecord, ImageRecords
from gateway.images.image_store import PINNED_SECONDS, StoreOutage, StoreWithSpare
from lookonce.core.errors import invalid
from lookonce.core.identity import canonical_json
from lookonce.core.stores.interface import leased

BUCKETS = 64
LOADED_AT_ONCE = 32
Entries = dict[str, float]  # digests in hexadecimal, with when the image was made (Unix seconds)
MAX_ALIASES = 16
_ALIAS = re.compile(r"(?!img_)[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_CONTEXT = "lookonce 2026 image alias"
log = structlog.get_logger(__name__)


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


class Aliases:
    """The names of all tenants."""

    def __init__(self, kept: StoreWithSpare) -> None:
        self._kept = kept

    async def find(self, tenant: str, name: str) -> tuple[bytes, float] | None:
        """The digest of the image of that name, and when that was made; None when there is none. Raises StoreOutage
        when the store could not be asked."""
        key = _name_key(tenant, name)
        value = await self._kept.spare.get(key)
        if value is None:
            value = await self._kept.store.get(key)
        else:  # given while the store could not keep it
            await self._kept.put(key, value, ttl=PINNED_SECONDS)
        if value is None:
            return None
        try:
            fields = orjson.loads(value)
            return bytes.fromhex(fields["digest"]), float(fields["created"])
        except (ValueError, TypeError, KeyError):
            log.warning("image alias unreadable, dropped")
            return None

    async def point(self, name: str, record: ImageRecord) -> None:
        """Give the name to the image, whoever had it."""
        value = orjson.dumps({"digest": record.digest.hex(), "created": record.created})
        await self._kept.put(_name_key(record.tenant, name), value, ttl=PINNED_SECONDS)

    async def drop(self, record: ImageRecord, name: str) -> bool:
        """Take the name away from this making of an image, unless another has it; whether that is confirmed."""
        try:
            found = await self.find(record.tenant, name)
        except StoreOutage:
            return False
        if found is not None and found != (record.digest, record.created):
            return True  # it has moved on
        return await self._kept.delete(_name_key(record.tenant, name))


def is_alias(name: str) -> bool:
    """Whether this could be an alias; an image id never is one."""
    return _ALIAS.fullmatch(name) is not None


def check_alias(name: str, param: str) -> str:
    """The name. Raises INVALID_ARGUMENT."""
    if is_alias(name):
        return name
    text = "must be 1 to 64 letters, digits, '_', '.' or '-', begin with a letter or digit, and not with 'img_'"
    raise invalid(f"'{param}' {text}", param=param)


def _name_key(tenant: str, name: str) -> bytes:
    fields = canonical_json({"tenant": tenant, "name": name})
    return b"alias:" + blake3(fields, derive_key_context=_CONTEXT).digest()
