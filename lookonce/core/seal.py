"""A seal binds a stored value to its place: no value is taken for another's, and no damaged one for whole.

A sealed value is 32 bytes of BLAKE3 over namespace, key and value, and then the value. With a secret the digest is
keyed: only who knows it can make a seal. Without one it is a checksum, which finds accidents and misplaced values, not
forgeries. Neither tells an older value of the same key from the newest.
"""

from __future__ import annotations

import hmac

from blake3 import blake3

SEAL_BYTES = 32
Bytes = bytes | bytearray | memoryview


class Sealer:
    """Seals of one namespace, and of one secret if there is any."""

    def __init__(self, namespace: str, secret: str = "") -> None:
        self._key = blake3(secret.encode(), derive_key_context="lookonce 2026 stored value").digest()
        self._namespace = _framed(namespace.encode())

    def seal(self, key: bytes, value: Bytes) -> bytes:
        """The value with its seal."""
        return b"".join((self._digest(key, value), value))

    def open(self, key: bytes, sealed: Bytes) -> memoryview | None:
        """The value, a view into `sealed`; None when the seal is not that of this place and value."""
        view = memoryview(sealed).cast("B").toreadonly()
        value = view[SEAL_BYTES:]
        return value if hmac.compare_digest(bytes(view[:SEAL_BYTES]), self._digest(key, value)) else None

    def _digest(self, key: bytes, value: Bytes) -> bytes:
        hasher = blake3(self._namespace + _framed(key), key=self._key)
        hasher.update(value)
        return hasher.digest()


def _framed(field: bytes) -> bytes:
    return len(field).to_bytes(8, "little") + field
