"""Which embeddings were made from an image, kept beside them so that an image can be forgotten by its digest alone.

Embeddings within the checkpoint's own pixel bounds have keys that anybody can derive; only the others are written down.
"""

from __future__ import annotations

from blake3 import blake3

from lookonce.core.identity import DIGEST_BYTES
from lookonce.core.stores import Store
from lookonce.core.stores.interface import leased


class ImageIndex:
    """Keys by image digest in `store`, the tier that processes share (never a cached copy)."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def keys(self, digest: bytes) -> set[bytes]:
        """Keys written down for an image."""
        return _split(await self._store.get(_entry(digest)))

    async def add(self, digest: bytes, key: bytes, *, ttl: float | None) -> None:
        """Write down that `key` was made from an image. Safe against other processes doing so at the same time."""
        entry = _entry(digest)
        async with leased(self._store, entry):
            keys = await self.keys(digest)
            if key not in keys:
                await self._store.put(entry, b"".join(sorted(keys | {key})), ttl=ttl)

    async def remove(self, digest: bytes) -> bool:
        """Drop the entry; True once it is known to be gone."""
        return await self._store.delete(_entry(digest))


def _entry(digest: bytes) -> bytes:
    return blake3(digest, derive_key_context="lookonce 2026 keys of an image").digest()


def _split(value: memoryview | None) -> set[bytes]:
    data = bytes(value or b"")
    whole = len(data) - len(data) % DIGEST_BYTES
    return {data[start : start + DIGEST_BYTES] for start in range(0, whole, DIGEST_BYTES)}
