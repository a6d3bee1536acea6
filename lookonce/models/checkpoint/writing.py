"""Writes safetensors checkpoints tensor by tensor: shard plan, files and index, with bounded memory. No torch.

safetensors' own writer wants every tensor of a file in memory at once; a 72B shard doesn't fit beside anything else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lookonce.core.errors import CheckpointError
from lookonce.models.checkpoint import files
from lookonce.models.checkpoint.headers import DTYPE_BYTES

DEFAULT_SHARD_BYTES = 4_000_000_000
Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to write: its name in the file, safetensors dtype code and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def plan_by_bytes(tensors: Iterable[TensorSpec], max_bytes: int) -> list[list[TensorSpec]]:
    """Consecutive groups of at most `max_bytes` each; a tensor larger than that has a group of its own."""
    if max_bytes < 1:
        raise CheckpointError(f"max_shard_bytes must be at least 1, got {max_bytes}")
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def plan_by_count(tensors: list[TensorSpec], shards: int) -> list[list[TensorSpec]]:
    """Exactly `shards` consecutive groups of about equal bytes, none empty."""
    if not 1 <= shards <= len(tensors):
        raise CheckpointError(f"shards must be between 1 and the number of tensors ({len(tensors)}), got {shards}")
    groups: list[list[TensorSpec]] = [[]]
    left = sum(tensor.nbytes for tensor in tensors)
    target = left / shards
    for position, tensor in enumerate(tensors):
        full = sum(other.nbytes for other in groups[-1]) >= target
        forced = len(tensors) - position <= shards - len(groups)
        if groups[-1] and len(groups) < shards and (full or forced):
            groups.append([])
        groups[-1].append(tensor)
    return groups


def write_shards(
    directory: Path, shards: list[list[TensorSpec]], data: Callable[[TensorSpec], Iterable[Buffer]]
) -> Iterator[Path]:
    """Write every shard (and the index when there are several), yielding each file as it is done.

    `data` gives a tensor's bytes in pieces, little-endian, row-major.
    """
    names = [files.SINGLE]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(tensor.nbytes for shard in shards for tensor in shard)
        write_json(directory / files.INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for name, shard in zip(names, shards, strict=True):
        _write_file(directory / name, shard, data)
        yield directory / name


def write_json(file: Path, value: object) -> None:
    """A JSON file for people to read."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_file(file: Path, tensors: list[TensorSpec], data: Callable[[TensorSpec], Iterable[Buffer]]) -> None:
    # Wider elements first, so that every tensor starts at a multiple of its element size.
    tensors = sorted(tensors, key=lambda tensor: (-DTYPE_BYTES[tensor.dtype], tensor.name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with open(file, "wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        for tensor in tensors:
            written = sum(stream.write(piece) for piece in data(tensor))
            if written != tensor.nbytes:
                raise CheckpointError(f"{file}: tensor {tensor.name!r} gave {written} bytes instead of {tensor.nbytes}")
