"""An embedding by reference: what travels between the processes instead of tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lookonce.core.errors import invalid
from lookonce.core.identity import DIGEST_BYTES


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
