"""Responses that are kept for a next turn, with the conversation that led to them: of one tenant, for a while, and no
longer than any image that they were made from."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from typing import Any

import orjson

from gateway.auth import Tenant
from gateway.images.image_records import ImageRecords
from gateway.images.image_store import StoreWithSpare
from lookonce.core.errors import ErrorKind, LookonceError

MAX_OF_IMAGE = 10_000
"""Responses that one image remembers; the oldest is erased before another is kept."""


class KeptResponses:
    """Beside the images, in their store."""

    def __init__(self, kept: StoreWithSpare, records: ImageRecords, *, ttl: float) -> None:
        """`ttl`: seconds that a response is kept."""
        self._kept, self._records, self._ttl = kept, records, ttl

    async def keep(self, tenant: Tenant, name: str, document: dict[str, Any], digests: Collection[bytes]) -> bool:
        """Keep it, unless one of its images has gone meanwhile; whether it is kept. What is put before an image
        remembers it can't outlive that image's erasure."""
        key = _key(tenant.name, name)
        value = {**document, "digests": [digest.hex() for digest in digests]}
        kept = await self._kept.put(key, orjson.dumps(value), ttl=self._ttl)
        for digest in digests:
            async with self._records.held(digest):
                record = await self._records.load(digest, fresh=True, held=True)
                if record is None or record.deleted:
                    await self._kept.delete(key)
                    return False
                names = [*await self._of(digest), key.hex()]
                for old in names[:-MAX_OF_IMAGE]:
                    await self._kept.delete(bytes.fromhex(old))
                await self._kept.put(_index(digest), orjson.dumps(names[-MAX_OF_IMAGE:]), ttl=self._ttl)
        return kept

    async def find(self, tenant: Tenant, name: str) -> dict[str, Any]:
        """A kept one. Raises NOT_FOUND."""
        value = await self._value(_key(tenant.name, name))
        document: dict[str, Any] = {} if value is None else orjson.loads(value)
        records = [await self._records.load(bytes.fromhex(digest)) for digest in document.get("digests", ())]
        if value is None or any(record is None or record.deleted for record in records):
            raise LookonceError(ErrorKind.NOT_FOUND, "no such response: it was never kept, or is no longer")
        return document

    async def drop(self, tenant: Tenant, name: str) -> None:
        """Erase one. Raises NOT_FOUND."""
        await self.find(tenant, name)
        await self._kept.delete(_key(tenant.name, name))

    async def drop_of(self, digest: bytes) -> bool:
        """Erase those made from an image, which the caller holds; whether that is confirmed."""
        gone = [await self._kept.delete(bytes.fromhex(key)) for key in await self._of(digest)]
        return all([*gone, await self._kept.delete(_index(digest))])

    async def _of(self, digest: bytes) -> list[str]:
        value = await self._value(_index(digest))
        names: list[str] = [] if value is None else orjson.loads(value)
        return names

    async def _value(self, key: bytes) -> bytes | None:
        spare = await self._kept.spare.get(key)
        value = spare if spare is not None else await self._kept.store.get(key)
        return None if value is None else bytes(value)


def _key(tenant: str, name: str) -> bytes:
    """The store's key: nobody reaches another tenant's by its name."""
    return b"response:" + hashlib.sha256(f"{len(tenant)}:{tenant}:{name}".encode()).digest()


def _index(digest: bytes) -> bytes:
    return b"responses-of:" + digest
