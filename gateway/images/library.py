"""Images as a resource: kept under an id made from their bytes, for a time or pinned, by names of the tenant's own,
encoded once, encoded again when an embedding is lost, erased everywhere. Never decodes an image, never sees a tensor;
knows nothing of HTTP."""

from __future__ import annotations

import asyncio
import binascii
import re
import secrets
import time
from dataclasses import dataclass, replace

import structlog

from gateway.auth import Tenant
from gateway.images.encoder import Encoder, Resolved
from gateway.images.erasure import Eraser, Erasure, Traces
from gateway.images.image_records import Change, ImageRecord, ImageRecords, file_key, resize_key
from gateway.images.image_store import PINNED_SECONDS, StoreOutage, StoreWithSpare
from gateway.images.index import MAX_ALIASES, Aliases, Listing, Page, is_alias
from gateway.images.kept_responses import KeptResponses
from gateway.images.pixel_bounds import AS_SERVED, PixelBounds
from gateway.images.vector_cache import VectorCache
from gateway.routing.retries import by_first_reachable
from gateway.routing.variants import Variant, Variants
from lookonce.core.errors import ErrorKind, LookonceError, invalid
from lookonce.core.identity import digest_of_image_id, image_digest
from lookonce.core.single_flight import Flights

ID_PREFIX = "img_"
_ID = re.compile(rf"{ID_PREFIX}([a-z2-7]{{52}})")
INLINE_HASH_BYTES = 1 << 20
"""Files up to this size are hashed on the event loop (0.2 ms); larger ones in a thread."""
log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Retention:
    """How an image is to be kept; None leaves it as it is."""

    ttl: float | None = None  # seconds
    pinned: bool | None = None
    alias: str | None = None


AS_IT_IS = Retention()


class ImageLibrary:
    """The images of all tenants."""

    def __init__(
        self, kept: StoreWithSpare, variants: Variants, encoder: Encoder, *, ttl: float, response_ttl: float
    ) -> None:
        self._kept, self._variants, self._encoder = kept, variants, encoder
        self._ttl = ttl  # seconds
        self._records = ImageRecords(kept)
        self._aliases = Aliases(kept)
        self._listing = Listing(kept, self._records)
        self.vectors = VectorCache(kept, self._records)
        self.responses = KeptResponses(kept, self._records, ttl=response_ttl)
        self._traces = Traces(kept, self._records, self._aliases, self._listing, self.responses)
        self._eraser = Eraser(variants)
        self._flights: Flights[Resolved] = Flights()

    @property
    def degraded(self) -> bool:
        """Whether the image store is out of order right now."""
        return any(tier.degraded for tier in self._kept.store.stats())

    async def close(self) -> None:
        """Stop background work, close the stores."""
        await self._eraser.close()
        await self._kept.close()

    async def add(
        self,
        data: bytes,
        tenant: Tenant,
        *,
        bounds: PixelBounds = AS_SERVED,
        verify: bool = False,
        retention: Retention = AS_IT_IS,
    ) -> tuple[ImageRecord, Resolved]:
        """Keep a file and have its embedding within `bounds`. A known file is not sent anywhere, unless `verify`
        (uploads: the vision service is asked whether it still has the embedding).

        Raises IMAGE_INVALID or IMAGE_TOO_LARGE for what is no usable image, INVALID_ARGUMENT for bounds out of range,
        UNAVAILABLE without a vision service.
        """
        digest = await _digest(data, tenant.digest_key)
        record = await self._known(digest)
        known, (served, *others) = None, self._variants.in_order(digest)
        if record is not None and not record.deleted:
            known = record.references.get(resize_key(bounds, served.name))
            left = record.expires - time.time()
            if known is not None and not verify and left > self._lifetime(record) / 2:
                return record, Resolved(known, "hit", 0.0, served.name)
        try:
            resolved = await self._encode(served, digest, data, tenant, bounds)
        except LookonceError as error:
            if error.kind not in (ErrorKind.UNAVAILABLE, ErrorKind.OVERLOADED):
                raise
            if known is not None:
                resolved = Resolved(known, "hit", 0.0, served.name)  # it may well be there: answering will tell
            elif others and error.kind is ErrorKind.UNAVAILABLE:
                resolved = await by_first_reachable(
                    others, lambda other: self._encode(other, digest, data, tenant, bounds)
                )
            else:
                raise
        async with self._records.held(digest):
            old = await self._known(digest, held=True)
            if old is None or old.deleted:
                changed = 0.0 if old is None else old.changed
                old = ImageRecord(digest, tenant.name, len(data), time.time(), 0, changed=changed)
            record = replace(self._kept_for(old, retention), upload=secrets.token_hex(8))
            record = record.with_reference(resize_key(bounds, resolved.variant), resolved.reference)
            await self._keep(record, data)
            await self._save(record)
            await self._listing.add(record)
        if retention.alias is not None:
            record = await self._name(record, retention.alias)
        return record, resolved

    async def _known(self, digest: bytes, *, held: bool = False) -> ImageRecord | None:
        """The record, afresh if it is held; without a store that can tell, an upload is kept all the same."""
        try:
            return await self._records.load(digest, fresh=held, held=held)
        except StoreOutage:
            return None

    async def get(self, identifier: str, tenant: Tenant, *, fresh: bool = False, held: bool = False) -> ImageRecord:
        """The image of that id or alias. Raises NOT_FOUND, also when it is another tenant's."""
        digest, created = await self._digest_of(identifier, tenant)
        record = await self._records.load(digest, fresh=fresh, held=held)
        if created is not None and record is not None and not _bears(record, identifier, created):
            record = await self._records.load(digest, fresh=True, sure=True, held=held)  # the name is the newer one
        if record is None or record.deleted or record.tenant != tenant.name:
            raise not_found()
        if created is not None and not _bears(record, identifier, created):
            raise not_found()  # the name of an image that was erased meanwhile
        return record

    async def page(self, tenant: Tenant, *, limit: int, after: str | None = None) -> Page:
        """The tenant's images, newest first, those after an id. Raises NOT_FOUND when there is no such image."""
        last = None if after is None else await self.get(after, tenant)
        return await self._listing.page(tenant.name, limit=limit, after=last)

    async def change(self, identifier: str, tenant: Tenant, retention: Retention) -> ImageRecord:
        """Keep the image differently from now on. Raises NOT_FOUND."""
        record = await self.get(identifier, tenant, fresh=True)
        async with self._records.held(record.digest):
            record = self._kept_for(await self.get(record.id, tenant, fresh=True, held=True), retention)
            await self._keep(record, await self._file(record, tenant))
            await self._save(record)
        return record if retention.alias is None else await self._name(record, retention.alias)

    async def unname(self, identifier: str, alias: str, tenant: Tenant) -> ImageRecord:
        """Take an alias away from an image. Raises NOT_FOUND when the image hasn't it."""
        record = await self.get(identifier, tenant, fresh=True)
        if alias not in record.aliases:
            raise LookonceError(ErrorKind.NOT_FOUND, "the image has no such alias", param="alias")
        if not await self._aliases.drop(record, alias):
            raise StoreOutage
        return await self._revise(record.digest, lambda one: one.without_alias(alias))

    async def resolve(
        self, record: ImageRecord, tenant: Tenant, bounds: PixelBounds, *, served: Variant, data: bytes | None
    ) -> Resolved:
        """A variant's embedding of the image within `bounds`; encoded when there is none yet, from `data` or the
        kept file."""
        known = record.references.get(resize_key(bounds, served.name))
        if known is not None:
            return Resolved(known, "hit", 0.0, served.name)
        return await self.renew(record, tenant, bounds, served=served, data=data)

    async def check_bounds(self, record: ImageRecord, bounds: PixelBounds) -> None:
        """Raise INVALID_ARGUMENT when the image can't be encoded within what was asked, as far as can be told now."""
        served = self._variants.in_order(record.digest)[0]
        if bounds.are_asked and resize_key(bounds, served.name) not in record.references:
            await self._encoder.check_bounds(served, bounds)

    async def renew(
        self, record: ImageRecord, tenant: Tenant, bounds: PixelBounds, *, served: Variant, data: bytes | None
    ) -> Resolved:
        """Encode again, from `data` or the kept file: the embedding was lost, or is another encoder's."""
        data = await self._file(record, tenant) if data is None else data
        resolved = await self._encode(served, record.digest, data, tenant, bounds)
        name, reference = resize_key(bounds, served.name), resolved.reference
        if await self._records.revise(record.digest, lambda current: current.with_reference(name, reference)) is None:
            # erased while it was encoded: leave nothing behind
            await self._eraser.forget([reference.key], [reference.image_digest])
            raise not_found()
        return resolved

    async def delete(self, identifier: str, tenant: Tenant) -> tuple[str, bool]:
        """Erase the file, its record, its embeddings and all KV made from them: its id, and whether every process and
        store confirmed; if not, erasure goes on in the background. Raises NOT_FOUND.

        Asking again is right while an earlier erasure is incomplete."""
        digest, _ = await self._digest_of(identifier, tenant)
        record = await self._records.load(digest, fresh=True)
        if record is None or record.tenant != tenant.name or record.erased:
            raise not_found()
        return record.id, await Erasure(record, self._traces, self._eraser).begin()

    async def _digest_of(self, identifier: str, tenant: Tenant) -> tuple[bytes, float | None]:
        """The digest in an id; or that behind an alias, with when its image was made."""
        if identifier.startswith(ID_PREFIX) or not is_alias(identifier):
            return parse_id(identifier), None
        found = await self._aliases.find(tenant.name, identifier)
        if found is None:
            raise not_found()
        return found

    async def _name(self, record: ImageRecord, alias: str) -> ImageRecord:
        """The image with one alias more, which is taken from the image that had it."""
        if alias not in record.aliases and len(record.aliases) >= MAX_ALIASES:
            raise invalid(f"the image has {MAX_ALIASES} aliases already, the limit is {MAX_ALIASES}", param="alias")
        try:
            found = await self._aliases.find(record.tenant, alias)
        except StoreOutage:  # whose it was stays unknown; it is this image's from now on
            found = None
        await self._aliases.point(alias, record)
        if found is not None and found[0] != record.digest:
            await self._records.revise(found[0], lambda former: former.without_alias(alias))
        return await self._revise(record.digest, lambda one: one.with_alias(alias))

    async def _revise(self, digest: bytes, change: Change) -> ImageRecord:
        """The record, changed. Raises NOT_FOUND when the image was erased meanwhile."""
        record = await self._records.revise(digest, change)
        if record is None:
            raise not_found()
        return record

    def _lifetime(self, record: ImageRecord) -> float:
        """Seconds the image is kept after its last upload."""
        if record.pinned:
            return PINNED_SECONDS
        return record.ttl if record.ttl is not None else self._ttl

    def _kept_for(self, record: ImageRecord, retention: Retention) -> ImageRecord:
        pinned = record.pinned if retention.pinned is None else retention.pinned
        record = replace(record, ttl=record.ttl if retention.ttl is None else retention.ttl, pinned=pinned)
        return replace(record, expires=time.time() + self._lifetime(record))

    async def _encode(
        self, served: Variant, digest: bytes, data: bytes, tenant: Tenant, bounds: PixelBounds
    ) -> Resolved:
        """One call for all who want the same embedding at once; it lives on when they go away."""
        key = (digest, resize_key(bounds, served.name))
        resolved, joined = await self._flights.run(
            key, lambda: self._encoder.encode(served, data, digest, tenant.embedding_key, bounds), keep=lambda: True
        )
        return replace(resolved, outcome="coalesced") if joined and resolved.outcome == "miss" else resolved

    async def _keep(self, record: ImageRecord, data: bytes) -> None:
        """Keep the file. Raises INVALID_ARGUMENT when there is no room for a pinned one, StoreOutage when one could not
        be kept for good: memory is no place for that."""
        key, ttl = file_key(record.digest), self._lifetime(record)
        if not record.pinned:
            unseen = self._records.is_unseen(record.digest)  # the file may be that of a pinned image, and stays one
            await (self._kept.spare if unseen else self._kept).put(key, data, ttl=ttl)
        elif not await self._kept.store.put(key, data, ttl=ttl):
            text = "there is no room for more pinned images: unpin or erase some, or let this one expire"
            raise invalid(text, param="pinned")

    async def _save(self, record: ImageRecord) -> None:
        """Keep the record. Raises StoreOutage when that of a pinned image could not be kept for good."""
        if not await self._records.save(record) and record.pinned:
            raise StoreOutage

    async def _file(self, record: ImageRecord, tenant: Tenant) -> bytes:
        """The kept file. Raises NOT_FOUND when it is gone, StoreOutage when the store could not be asked."""
        outage: StoreOutage | None = None
        for store in (self._kept.spare, self._kept.store):
            try:
                value = await store.get(file_key(record.digest))
            except StoreOutage as error:
                outage = error
                continue
            if value is None:
                continue
            data = bytes(value)
            if await _digest(data, tenant.digest_key) == record.digest:
                return data
            log.warning("kept image file is another's, dropped", image=record.id)
            await store.discard(file_key(record.digest), data)
        if outage is not None:
            raise outage
        raise LookonceError(ErrorKind.NOT_FOUND, "the image's file is no longer kept: upload it again", param="image")


def parse_id(identifier: str) -> bytes:
    """The digest in an image id. Raises NOT_FOUND for what cannot be one."""
    match = _ID.fullmatch(identifier)
    if match is None:
        raise not_found()
    try:
        return digest_of_image_id(identifier)
    except binascii.Error as error:
        raise not_found() from error


def _bears(record: ImageRecord, name: str, created: float) -> bool:
    """Whether a name that was given to the image made at `created` is this one's."""
    return not record.deleted and (record.created == created or name in record.aliases)


def not_found() -> LookonceError:
    """No such image, or not this tenant's."""
    return LookonceError(ErrorKind.NOT_FOUND, "no such image", param="image")


async def _digest(data: bytes, key: bytes) -> bytes:
    if len(data) <= INLINE_HASH_BYTES:
        return image_digest(data, key)
    return await asyncio.to_thread(image_digest, data, key)
