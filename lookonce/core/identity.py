"""Digests, BLAKE3-256 throughout: what makes two images, two encoders and two embeddings the same, and the seal that
binds a stored value to its place.

Every digest of several fields is taken over canonical JSON under a domain-separating context, so fields can't run into
each other. Knows nothing of stores, calls or torch.
"""

from __future__ import annotations

import base64
import hmac
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from blake3 import blake3

from lookonce.core.errors import invalid
from protos.lookonce.v1 import common_pb2

DIGEST_BYTES = SEAL_BYTES = 32
WEIGHTS_DIGEST = r"blake3:[0-9a-f]{64}"
"""How a digest of weights looks: a regular expression."""
RECORD_SCHEMA = 2
CODE_VERSION = 2
"""Of our preprocessing and encoding and of what a fingerprint covers: when one changes, so does every fingerprint."""
SHARED_TENANT_KEY = bytes(DIGEST_BYTES)
"""The digest key of a deployment where tenants share embeddings (or where there is only one)."""


def tenant_key(secret: str, tenant: str) -> bytes:
    """Derive a tenant's 32-byte digest key from the deployment's secret."""
    return _digest("lookonce 2026 tenant key", {"secret": secret, "tenant": tenant})


def cache_salt(secret: str, tenant: str) -> bytes:
    """Derive the 32 bytes that keep a tenant's KV apart. They tell nothing of its digest key."""
    return _digest("lookonce 2026 cache salt", {"secret": secret, "tenant": tenant})


def image_digest(data: bytes | memoryview, key: bytes = SHARED_TENANT_KEY) -> bytes:
    """Digest (32 bytes) of an encoded image file exactly as received, keyed with the tenant's key."""
    if len(key) != DIGEST_BYTES:
        raise invalid(f"tenant_key must be {DIGEST_BYTES} bytes, got {len(key)}", param="tenant_key")
    return blake3(data, key=key).digest()


def image_id(digest: bytes) -> str:
    """Public id of an image: `img_` and the digest in lower-case base32 (52 characters)."""
    return "img_" + base64.b32encode(digest).decode("ascii").rstrip("=").lower()


def digest_of_image_id(identifier: str) -> bytes:
    """The digest that `image_id` was given. Raises ValueError for what is no id."""
    return base64.b32decode(identifier.removeprefix("img_").upper() + "====")


@dataclass(frozen=True)
class EncoderSpec:
    """All that decides the bytes of an embedding, apart from the image and its pixel bounds.

    Checkpoints that share a vision half share it, whatever their language halves are.
    """

    vision_weights: str  # digest of the vision half's tensors: "blake3:hex" (`lookonce.models.checkpoint.digest`)
    family: str  # its model_type
    vision_config: dict[str, Any]
    preprocessor: dict[str, Any]  # resample, mean, std, rescale factor, EXIF and alpha handling
    dtype: str  # compute dtype: "float32" | "bfloat16" | "float16"
    quantization: str = "none"

    def fingerprint(self) -> str:
        """Encoder fingerprint: 64 hexadecimal characters."""
        fields = _settled(asdict(self)) | {"record_schema": RECORD_SCHEMA, "code": CODE_VERSION}
        return _digest("lookonce 2026 encoder fingerprint", fields).hex()


def embedding_key(digest: bytes, fingerprint: str, min_pixels: int, max_pixels: int) -> bytes:
    """Key (32 bytes) of the embedding of one image by one encoder within one pair of pixel bounds."""
    fields = {"image": digest.hex(), "encoder": fingerprint, "min_pixels": min_pixels, "max_pixels": max_pixels}
    return _digest("lookonce 2026 embedding key", fields)


@dataclass(frozen=True)
class EmbeddingReference:
    """Enough to find an embedding, to check it, and to lay out its placeholder tokens."""

    key: bytes  # embedding key, 32 bytes
    fingerprint: str  # encoder fingerprint, 64 hex characters
    image_digest: bytes  # 32 bytes
    grid_thw: tuple[int, int, int]  # patches before merging
    tokens: int  # rows of the embedding
    width: int  # pixels of the source image, after EXIF orientation
    height: int
    record_bytes: int = 0

    def check(self, tokens_of: Callable[[tuple[int, int, int]], int]) -> None:
        """Raise INVALID_ARGUMENT unless the fields agree with each other. `tokens_of`: the family's tokens_per_grid."""
        if len(self.key) != DIGEST_BYTES:
            raise invalid(f"image.key must be {DIGEST_BYTES} bytes, got {len(self.key)}", param="image.key")
        if len(self.image_digest) != DIGEST_BYTES:
            raise invalid(f"image.image_digest must be {DIGEST_BYTES} bytes", param="image.image_digest")
        tokens = tokens_of(self.grid_thw)
        if tokens != self.tokens:
            grid = "x".join(map(str, self.grid_thw))
            raise invalid(f"image.tokens is {self.tokens}, grid {grid} makes {tokens}", param="image.tokens")

    def to_proto(self) -> common_pb2.ImageReference:
        """The reference as a message of the contract."""
        t, h, w = self.grid_thw
        return common_pb2.ImageReference(
            key=self.key,
            fingerprint=self.fingerprint,
            image_digest=self.image_digest,
            grid=common_pb2.Grid(t=t, h=h, w=w),
            tokens=self.tokens,
            width=self.width,
            height=self.height,
            record_bytes=self.record_bytes,
        )

    @classmethod
    def from_proto(cls, message: common_pb2.ImageReference) -> EmbeddingReference:
        """The reference in a message, unchecked: call `check` before use."""
        return cls(
            key=message.key,
            fingerprint=message.fingerprint,
            image_digest=message.image_digest,
            grid_thw=(message.grid.t, message.grid.h, message.grid.w),
            tokens=message.tokens,
            width=message.width,
            height=message.height,
            record_bytes=message.record_bytes,
        )


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces, so that equal values have equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")


def _digest(context: str, fields: dict[str, Any]) -> bytes:
    return blake3(canonical_json(fields), derive_key_context=context).digest()


def _settled(value: Any) -> Any:
    """4.0 is 4, and a tuple a list: files that say the same differ in that."""
    if isinstance(value, dict):
        return {key: _settled(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_settled(entry) for entry in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


class Sealer:
    """Seals of one namespace: no value is taken for another's, and no damaged one for whole.

    A sealed value is 32 bytes of BLAKE3 over namespace, key and value, and then the value. With a secret the digest is
    keyed: only who knows it can make a seal. Without one it is a checksum, which finds accidents and misplaced values,
    not forgeries. Neither tells an older value of the same key from the newest.
    """

    def __init__(self, namespace: str, secret: str = "") -> None:
        self._key = blake3(secret.encode(), derive_key_context="lookonce 2026 stored value").digest()
        self._namespace = _framed(namespace.encode())

    def seal(self, key: bytes, value: bytes | bytearray | memoryview) -> bytes:
        """The value with its seal."""
        return b"".join((self._digest(key, value), value))

    def open(self, key: bytes, sealed: bytes | bytearray | memoryview) -> memoryview | None:
        """The value, a view into `sealed`; None when the seal is not that of this place and value."""
        view = memoryview(sealed).cast("B").toreadonly()
        value = view[SEAL_BYTES:]
        return value if hmac.compare_digest(bytes(view[:SEAL_BYTES]), self._digest(key, value)) else None

    def _digest(self, key: bytes, value: bytes | bytearray | memoryview) -> bytes:
        hasher = blake3(self._namespace + _framed(key), key=self._key)
        hasher.update(value)
        return hasher.digest()


def _framed(field: bytes) -> bytes:
    return len(field).to_bytes(8, "little") + field
