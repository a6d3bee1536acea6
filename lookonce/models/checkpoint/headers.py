"""Reads the header of a safetensors file: which tensors it holds, and where. Needs no torch.

The format: 8 bytes little-endian header length, that many bytes of JSON, then the data (see the format's own
page, huggingface.co/docs/safetensors). Every declared size is checked against the file's real one before anyone reads
by it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lookonce.core.errors import CheckpointError

DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000
_PIECE_BYTES = 16 << 20
_DOWNLOAD_AGAIN = "the file is damaged or was not copied whole: download it again"


@dataclass(frozen=True)
class TensorEntry:
    """One stored tensor: its name in the file and the bytes it occupies there."""

    stored_name: str
    file: Path
    dtype: str  # safetensors code: "BF16", "F32", ...
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    nbytes: int

    def pieces(self) -> Iterator[bytes]:
        """Its bytes as stored, 16 MiB at a time. Raises OSError, CheckpointError when the file has become shorter."""
        with open(self.file, "rb", buffering=0) as stream:
            offset, end = self.offset, self.offset + self.nbytes
            while offset < end:
                piece = os.pread(stream.fileno(), min(_PIECE_BYTES, end - offset), offset)
                if not piece:
                    raise CheckpointError(f"{self.file}: ends inside tensor {self.stored_name!r}; download it again")
                yield piece
                offset += len(piece)


def read_header(file: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Tensors (by stored name) and metadata of a safetensors file.

    Raises CheckpointError naming the file when it is missing, truncated, or declares what cannot be.
    """
    try:
        size = os.stat(file).st_size
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(f"{file}: truncated or not safetensors ({size} bytes); {_DOWNLOAD_AGAIN}")
            raw = stream.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; download the shard again") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); check its permissions") from None
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__", None) or {}
        entries = {name: _entry(file, name, info, 8 + length, size) for name, info in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise CheckpointError(f"{file}: its safetensors header cannot be parsed; {_DOWNLOAD_AGAIN}") from None
    return entries, metadata


def _entry(file: Path, name: str, info: dict[str, Any], base: int, size: int) -> TensorEntry:
    begin, end = (int(offset) for offset in info["data_offsets"])
    shape = tuple(int(side) for side in info["shape"])
    dtype = info["dtype"]
    if dtype not in DTYPE_BYTES:
        raise CheckpointError(f"{file}: tensor {name!r} has dtype {dtype!r}, which is not supported")
    if begin < 0 or any(side < 0 for side in shape) or end - begin != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise CheckpointError(
            f"{file}: tensor {name!r} declares {end - begin} bytes for {dtype} {list(shape)}; {_DOWNLOAD_AGAIN}"
        )
    if base + end > size:
        raise CheckpointError(
            f"{file}: truncated: tensor {name!r} ends at byte {base + end} but the file has {size}; {_DOWNLOAD_AGAIN}"
        )
    return TensorEntry(name, file, dtype, shape, base + begin, end - begin)


def read_bytes(entry: TensorEntry) -> bytes:
    """A small tensor's bytes: settings that a file keeps as a tensor. Raises CheckpointError."""
    try:
        with open(entry.file, "rb", buffering=0) as stream:
            found = os.pread(stream.fileno(), entry.nbytes, entry.offset)
    except OSError as error:
        raise CheckpointError(f"{entry.file} cannot be read ({error.strerror}); check its permissions") from None
    if len(found) != entry.nbytes:
        raise CheckpointError(f"{entry.file}: ends inside tensor {entry.stored_name!r}; {_DOWNLOAD_AGAIN}")
    return found
