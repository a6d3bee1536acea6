"""The nearest tier: embeddings as tensors on the model's device, least recently used out first. Not thread-safe."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container
from dataclasses import dataclass

import torch

from lookonce.core.identity import EmbeddingReference


@dataclass(frozen=True)
class _Entry:
    rows: torch.Tensor
    reference: EmbeddingReference


class TensorCache:
    """Rows [tokens, hidden] by embedding key, within a byte budget."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, reference: EmbeddingReference) -> torch.Tensor | None:
        """The rows, if they are of this very reference (key, image, grid and encoder agree)."""
        entry = self._entries.get(reference.key)
        if entry is None or not _same(entry.reference, reference):
            return None
        self._entries.move_to_end(reference.key)
        return entry.rows

    def put(self, reference: EmbeddingReference, rows: torch.Tensor) -> None:
        """Keep the rows, dropping others to stay within the budget; rows over the whole budget are not kept."""
        self.pop(reference.key)
        if rows.nbytes > self.max_bytes:
            return
        self._entries[reference.key] = _Entry(rows, reference)
        self.bytes += rows.nbytes
        while self.bytes > self.max_bytes:
            self.pop(next(iter(self._entries)))

    def pop(self, key: bytes) -> bool:
        """Drop an entry; whether it was there."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.bytes -= entry.rows.nbytes
        return entry is not None

    def keys_of(self, image_digests: Container[bytes]) -> list[bytes]:
        """Keys of the entries made from these images."""
        return [key for key, entry in self._entries.items() if entry.reference.image_digest in image_digests]


def _same(one: EmbeddingReference, other: EmbeddingReference) -> bool:
    fields = ("fingerprint", "image_digest", "grid_thw", "tokens")
    return all(getattr(one, field) == getattr(other, field) for field in fields)
