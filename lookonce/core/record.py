"""The embedding record: one self-describing byte string, read without copying.

Layout (the safetensors format): 8-byte little-endian header length, JSON header, tensor data. The metadata holds the
schema version, key, fingerprint, image digest, grid_thw, source size, token count and a BLAKE3 checksum over all of
it. No torch here: `lookonce.models.tensors` turns views into tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from blake3 import blake3

from lookonce.core.errors import RecordError
from lookonce.core.identity import RECORD_SCHEMA, canonical_json

ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
"""Allowed dtypes, by their safetensors names, and bytes an element."""
EMBEDDING = "image_embeds"
"""The tensor [tokens, hidden] that every record holds: the rows that stand in a prompt."""
MAX_HEADER_BYTES = 64 * 1024
MAX_TENSORS = 16


def tensor_names(deepstack: int = 0) -> tuple[str, ...]:
    """Names of a record's tensors, all [tokens, hidden]: EMBEDDING, and what is added to its tokens behind each of so
    many first layers of the language model (DeepStack, arXiv:2406.04334)."""
    return (EMBEDDING, *(f"deepstack.{layer}" for layer in range(deepstack)))


@dataclass(frozen=True)
class TensorView:
    """One tensor of a record: raw little-endian data in row-major order."""

    dtype: str  # key of ITEM_BYTES
    shape: tuple[int, ...]
    data: memoryview  # read-only, prod(shape) * item bytes long


@dataclass(frozen=True)
class EmbeddingRecord:
    """A decoded record. `grid_thw` counts patches before merging: rows == t*h*w / merge²."""

    key: bytes  # embedding key, 32 bytes: what it is stored under
    fingerprint: str  # 64 hex characters
    image_digest: bytes  # 32 bytes
    grid_thw: tuple[int, int, int]
    width: int  # pixels of the source image, after EXIF orientation
    height: int
    tokens: int  # rows of EMBEDDING
    tensors: Mapping[str, TensorView]

    def serialize(self) -> bytes:
        """The record's bytes. Raises RecordError when the fields contradict each other."""
        _check_tensors(self.tensors, self.tokens)
        header = self._header()
        data = b"".join(self.tensors[name].data for name in sorted(self.tensors))
        metadata = self._metadata()
        text = _header_text(header, metadata, _checksum(header, metadata, data))
        return len(text).to_bytes(8, "little") + text + data

    @property
    def nbytes(self) -> int:
        """Length of `serialize()`, without doing it."""
        text = _header_text(self._header(), self._metadata(), "0" * 64)
        return 8 + len(text) + sum(len(view.data) for view in self.tensors.values())

    def _header(self) -> dict[str, Any]:
        header: dict[str, Any] = {}
        offset = 0
        for name in sorted(self.tensors):
            view = self.tensors[name]
            end = offset + len(view.data)
            header[name] = {"dtype": view.dtype, "shape": list(view.shape), "data_offsets": [offset, end]}
            offset = end
        return header

    def _metadata(self) -> dict[str, str]:
        return {
            "schema": str(RECORD_SCHEMA),
            "key": self.key.hex(),
            "fingerprint": self.fingerprint,
            "image_digest": self.image_digest.hex(),
            "grid_thw": ",".join(map(str, self.grid_thw)),
            "width": str(self.width),
            "height": str(self.height),
            "tokens": str(self.tokens),
        }


def parse_record(value: bytes | bytearray | memoryview, key: bytes) -> EmbeddingRecord:
    """Decode and verify the record of `key`; its tensors are views into `value`. Raises RecordError on anything amiss,
    and when it is of another key."""
    buffer = memoryview(value).cast("B").toreadonly()
    header, data = _split(buffer)
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict):
        raise RecordError("embedding record: no metadata")
    checksum = metadata.pop("checksum", None)
    try:
        expected = _checksum(header, metadata, data)
    except (ValueError, RecursionError) as error:  # what JSON readers take and writers refuse: NaN, depth
        raise RecordError("embedding record: malformed header") from error
    if checksum != expected:
        raise RecordError("embedding record: checksum does not match")
    try:  # past the checksum a wrong field means a writer of another version, not chance
        if int(metadata["schema"]) != RECORD_SCHEMA:
            raise RecordError(f"embedding record: schema {metadata['schema']}, this reader knows {RECORD_SCHEMA}")
        t, h, w = map(int, metadata["grid_thw"].split(","))
        record = EmbeddingRecord(
            key=bytes.fromhex(metadata["key"]),
            fingerprint=metadata["fingerprint"],
            image_digest=bytes.fromhex(metadata["image_digest"]),
            grid_thw=(t, h, w),
            width=int(metadata["width"]),
            height=int(metadata["height"]),
            tokens=int(metadata["tokens"]),
            tensors={name: _view(entry, data) for name, entry in header.items()},
        )
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise RecordError("embedding record: malformed header") from error
    if record.key != key:
        raise RecordError("embedding record: it is of another key")
    _check_tensors(record.tensors, record.tokens)
    return record


def _header_text(header: dict[str, Any], metadata: dict[str, str], checksum: str) -> bytes:
    text = canonical_json({"__metadata__": metadata | {"checksum": checksum}, **header})
    return text + b" " * (-(len(text) + 8) % 64)  # so that tensor data starts on a 64-byte boundary


def _split(buffer: memoryview) -> tuple[dict[str, Any], memoryview]:
    if len(buffer) < 8:
        raise RecordError("embedding record: truncated")
    length = int.from_bytes(buffer[:8], "little")
    if not 2 <= length <= min(MAX_HEADER_BYTES, len(buffer) - 8):
        raise RecordError("embedding record: header length out of bounds")
    try:
        header = json.loads(bytes(buffer[8 : 8 + length]))
    except (ValueError, RecursionError) as error:
        raise RecordError("embedding record: header is not JSON") from error
    if not isinstance(header, dict):
        raise RecordError("embedding record: header is not an object")
    return header, buffer[8 + length :]


def _view(entry: dict[str, Any], data: memoryview) -> TensorView:
    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end <= len(data):
        raise RecordError("embedding record: tensor outside the data")
    return TensorView(entry["dtype"], tuple(int(n) for n in entry["shape"]), data[begin:end])


def _check_tensors(tensors: Mapping[str, TensorView], tokens: int) -> None:
    if EMBEDDING not in tensors or len(tensors) > MAX_TENSORS:
        raise RecordError(f"embedding record: needs {EMBEDDING!r} and at most {MAX_TENSORS} tensors")
    for name, view in tensors.items():
        if view.dtype not in ITEM_BYTES:
            raise RecordError(f"embedding record: {name} has dtype {view.dtype}, allowed are {', '.join(ITEM_BYTES)}")
        if len(view.shape) != 2 or view.shape[0] != tokens or view.shape[1] < 1:
            raise RecordError(f"embedding record: {name} has shape {list(view.shape)}, expected [{tokens}, hidden]")
        if len(view.data) != prod(view.shape) * ITEM_BYTES[view.dtype]:
            raise RecordError(f"embedding record: {name} has {len(view.data)} bytes for shape {list(view.shape)}")


def _checksum(header: dict[str, Any], metadata: dict[str, str], data: bytes | memoryview) -> str:
    hasher = blake3(derive_key_context="lookonce 2026 embedding record")
    prefix = canonical_json([header, metadata])
    hasher.update(len(prefix).to_bytes(8, "little") + prefix)
    hasher.update(data)
    return hasher.hexdigest()
