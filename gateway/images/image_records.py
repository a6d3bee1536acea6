"""What is known of each kept image, in the image store: a small JSON record beside the file's bytes.

Records are cached in this process for a second, so that a warm question costs no store access. A deletion leaves a
tombstone, so that other gateways tell "deleted" from "lost by the store" (evicted, restarted empty, out of reach): a
lost record is put back from the cache, a deleted one never.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any
from weakref import WeakValueDictionary

import orjson
import structlog

from gateway.images.image_store import FILE_KEY, StoreOutage, StoreWithSpare
from gateway.images.pixel_bounds import AS_SERVED, PixelBounds
from gateway.routing.variants import DEFAULT
from lookonce.core.identity import EmbeddingReference, image_id
from lookonce.core.stores.interface import leased

CONFIRMED = 1.0
"""Seconds a cached record is good without a look at the store: how late other gateways notice a deletion."""
OUTLIVES_STORE = 600.0
"""Seconds since its last confirmation that a record lost by the store is believed."""
TOMBSTONE_TTL = 3600.0  # longer than any cache believes a lost record
CACHED_RECORDS = 16384
MAX_REFERENCES = 32
"""Embeddings of one image that its record names, the latest; the vision service knows them all when they are erased."""
CLOCK_STEP = 1e-3  # seconds that a record's change is later than the one before, whatever the clocks say
Change = Callable[["ImageRecord"], "ImageRecord"]
_VERSION = 1
log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class ImageRecord:
    """One image of one tenant. `references` holds the embeddings made of it, by resize key (see `resize_key`)."""

    digest: bytes  # 32 bytes, keyed with the tenant's key: the id is made from it
    tenant: str
    size: int  # bytes of the file
    created: float  # Unix seconds
    expires: float
    references: dict[str, EmbeddingReference] = field(default_factory=dict)
    deleted: bool = False  # a tombstone; its references name what is to be erased
    erased: bool = False  # of a tombstone: every process confirmed
    ttl: float | None = None  # seconds, the image's own; None: the gateway's
    pinned: bool = False  # kept until it is erased
    aliases: tuple[str, ...] = ()
    upload: str = field(default_factory=lambda: secrets.token_hex(8))  # another one each time that it is uploaded
    changed: float = 0.0  # Unix seconds of the latest change; grows with each

    @property
    def id(self) -> str:
        """The public id."""
        return image_id(self.digest)

    @property
    def reference(self) -> EmbeddingReference | None:
        """The embedding of the image in full, or else of any size."""
        return self.references.get(resize_key(AS_SERVED)) or next(iter(self.references.values()), None)

    def with_reference(self, name: str, reference: EmbeddingReference) -> ImageRecord:
        """The record with the embedding of one resize key set, as the last."""
        others = [item for item in self.references.items() if item[0] != name]
        dropped = others[: max(0, len(others) + 1 - MAX_REFERENCES)]
        return replace(self, references=dict(others[len(dropped) :]) | {name: reference})

    def with_alias(self, alias: str) -> ImageRecord:
        """The record with one name more, as the last."""
        return replace(self.without_alias(alias), aliases=(*self.without_alias(alias).aliases, alias))

    def without_alias(self, alias: str) -> ImageRecord:
        """The record without a name."""
        return replace(self, aliases=tuple(name for name in self.aliases if name != alias))

    def to_json(self) -> bytes:
        """The stored form."""
        return orjson.dumps({"version": _VERSION, **asdict(self)}, default=bytes.hex)


def resize_key(bounds: PixelBounds, model: str = DEFAULT) -> str:
    """What tells the embeddings of one image apart: the bounds it was resized within, after the variant."""
    return bounds.name if model == DEFAULT else f"{model}/{bounds.name}"


def _parsed(value: memoryview | None) -> ImageRecord | None:
    """The record in its stored form; None when it is not one (another version's, or damaged)."""
    if value is None:
        return None
    try:
        found = orjson.loads(value)
        if found["version"] != _VERSION:
            return None
        own = {item.name: found[item.name] for item in fields(ImageRecord) if item.name in found}
        own["digest"], own["upload"] = bytes.fromhex(found["digest"]), str(found["upload"])
        own["aliases"] = tuple(found.get("aliases", ()))
        own["references"] = {name: _reference(item) for name, item in found["references"].items()}
        return ImageRecord(**own)
    except (ValueError, KeyError, TypeError, AttributeError):
        log.warning("image record unreadable, dropped")
        return None


def _reference(found: dict[str, Any]) -> EmbeddingReference:
    own = {item.name: found[item.name] for item in fields(EmbeddingReference) if item.name in found}
    own["key"], own["image_digest"] = bytes.fromhex(found["key"]), bytes.fromhex(found["image_digest"])
    t, h, w = found["grid_thw"]
    return EmbeddingReference(**own | {"grid_thw": (t, h, w)})


@dataclass(frozen=True)
class _Cached:
    record: ImageRecord
    confirmed: float  # seconds on the monotonic clock, from before the store was asked


class ImageRecords:
    """Loads, saves and buries records."""

    def __init__(self, kept: StoreWithSpare) -> None:
        self._kept, self._store, self._spare = kept, kept.store, kept.spare
        self._cache: OrderedDict[bytes, _Cached] = OrderedDict()  # least recently used first
        self._locks: WeakValueDictionary[bytes, asyncio.Lock] = WeakValueDictionary()
        self._unseen: set[bytes] = set()  # held images whose record the store could not tell

    async def load(
        self, digest: bytes, *, fresh: bool = False, sure: bool = False, held: bool = False
    ) -> ImageRecord | None:
        """The record, a tombstone included, or None. `fresh`: ask the store even within the cache's second. `sure`:
        what the store can't tell is not told from memory. `held`: the caller holds the image (see `held`); if not, it
        is held while what the store lacks is written back.

        Raises StoreOutage when the store could not be asked and nothing is known here."""
        cached = self._cache.get(digest)
        if cached is not None and not fresh and time.monotonic() - cached.confirmed < CONFIRMED:
            self._cache.move_to_end(digest)
            return self._unexpired(cached.record)
        asked = time.monotonic()
        spare = _parsed(await self._spare.get(_key(digest)))
        try:
            stored = _parsed(await self._store.get(_key(digest)))
        except StoreOutage:
            if held:
                self._unseen.add(digest)
            known = spare or self._believed(cached)
            if sure or known is None:
                raise
            return self._unexpired(known)
        self._unseen.discard(digest)
        believed = self._believed(cached)
        if stored is not None and believed is not None and stored.changed < believed.changed:
            stored = None  # a write that was given up long ago and came after all: the later one is lost
        if stored is None and spare is None and believed is None:
            self._cache.pop(digest, None)
            return None
        if not held and (stored is None or spare is not None):
            async with self.held(digest):
                return await self.load(digest, fresh=True, sure=sure, held=True)
        if spare is not None:
            stored = await self._reconciled(spare, stored)
        if stored is None:
            return await self._lost(digest, cached)
        self._remember(stored, asked)
        await self._return_file(stored)
        return self._unexpired(stored)

    async def save(self, record: ImageRecord) -> bool:
        """Keep the record until it expires; whether the store has it, or only this process. Where the store's own could
        not be seen while the image is held, nothing is written over it: both are joined when it can be."""
        return await self._write(self._changed(record))

    @asynccontextmanager
    async def held(self, digest: bytes) -> AsyncIterator[None]:
        """The image is changed by nobody else, in any gateway, while the body runs. Not reentrant."""
        lock = self._locks.setdefault(digest, asyncio.Lock())  # so that only one of this process polls for the lease
        async with lock, leased(self._store, _key(digest)):
            try:
                yield
            finally:
                self._unseen.discard(digest)

    def is_unseen(self, digest: bytes) -> bool:
        """Whether the image is held, and the store could not tell what it has of it."""
        return digest in self._unseen

    async def revise(self, digest: bytes, change: Change) -> ImageRecord | None:
        """Change the record as it is now; None when there is none, or it is deleted."""
        async with self.held(digest):
            record = await self.load(digest, fresh=True, held=True)
            if record is None or record.deleted:
                return None
            record = change(record)
            await self.save(record)
            return record

    async def bury(self, record: ImageRecord, asked: float) -> bool:
        """Put a tombstone in the record's place; whether the store has it. `asked`: Unix seconds of the erasure. An
        upload after it that the store can't tell of now is not buried."""
        tombstone = self._changed(replace(record, deleted=True, expires=time.time() + TOMBSTONE_TTL))
        if self.is_unseen(record.digest):
            tombstone = replace(tombstone, changed=max(asked, record.changed + CLOCK_STEP))
        return await self._write(tombstone)

    async def _write(self, record: ImageRecord) -> bool:
        if self.is_unseen(record.digest):
            self._cache.pop(record.digest, None)
            await self._spare.put(_key(record.digest), record.to_json(), ttl=self._left(record))
            return False
        self._remember(record, time.monotonic())
        return await self._kept.put(_key(record.digest), record.to_json(), ttl=self._left(record))

    async def _reconciled(self, spare: ImageRecord, stored: ImageRecord | None) -> ImageRecord:
        """The record after an outage, written back: that which the store could not keep, or the store's if it is later
        or both if neither knew of the other."""
        if stored is None:
            record = spare
        elif spare.deleted or stored.deleted or spare.created == stored.created:
            buried = stored.deleted and stored.upload == spare.upload
            record = stored if buried or stored.changed > spare.changed else spare
        else:
            record = _joined(spare, stored)
        await self._write(record)
        return record

    async def _return_file(self, record: ImageRecord) -> None:
        """Put a file into the store that could not be kept there when it came."""
        key = file_key(record.digest)
        file = await self._spare.get(key) if await self._spare.contains(key) else None
        if file is not None and not record.deleted:
            await self._kept.put(key, file, ttl=self._left(record))

    async def _lost(self, digest: bytes, cached: _Cached | None) -> ImageRecord | None:
        record = self._believed(cached)
        if record is None:
            self._cache.pop(digest, None)
            return None
        record = self._unexpired(record)
        if record is not None:
            await self._write(record)
        return record

    def _believed(self, cached: _Cached | None) -> ImageRecord | None:
        """A record that was cached not long ago."""
        believed = cached is not None and time.monotonic() - cached.confirmed < OUTLIVES_STORE
        return cached.record if cached is not None and believed else None

    def _left(self, record: ImageRecord) -> float:
        return max(record.expires - time.time(), 1.0)

    def _changed(self, record: ImageRecord) -> ImageRecord:
        return replace(record, changed=max(time.time(), record.changed + CLOCK_STEP))

    def _unexpired(self, record: ImageRecord) -> ImageRecord | None:
        return record if record.expires > time.time() else None

    def _remember(self, record: ImageRecord, confirmed: float) -> None:
        known = self._cache.get(record.digest)
        if known is not None and known.confirmed > confirmed and known.record.changed > record.changed:
            return  # changed while the store was asked
        self._cache[record.digest] = _Cached(record, confirmed)
        self._cache.move_to_end(record.digest)
        while len(self._cache) > CACHED_RECORDS:
            self._cache.popitem(last=False)


def _joined(spare: ImageRecord, stored: ImageRecord) -> ImageRecord:
    """An image that was uploaded while the store could not tell that it had it."""
    return replace(
        stored,
        expires=max(spare.expires, stored.expires),
        references=stored.references | spare.references,
        ttl=stored.ttl if spare.ttl is None else spare.ttl,
        pinned=stored.pinned or spare.pinned,
        aliases=tuple(dict.fromkeys((*stored.aliases, *spare.aliases))),
        upload=spare.upload,
        changed=max(spare.changed, stored.changed) + CLOCK_STEP,
    )


def _key(digest: bytes) -> bytes:
    return b"record:" + digest


def file_key(digest: bytes) -> bytes:
    """Where an image's file is kept."""
    return FILE_KEY + digest
