"""An embedding by reference: what travels between the processes instead of tensors."""

from __future__ import annotations

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
    tokens: int  # == t*h*w / merge²
    width: int  # pixels of the source picture, after EXIF orientation
    height: int
    record_bytes: int = 0

    def check(self, merge_size: int) -> None:
        """Raise INVALID_ARGUMENT unless the fields agree with each other."""
        if len(self.key) != DIGEST_BYTES:
            raise invalid(f"image.key must be {DIGEST_BYTES} bytes, got {len(self.key)}", param="image.key")
        if len(self.image_digest) != DIGEST_BYTES:
            raise invalid(f"image.image_digest must be {DIGEST_BYTES} bytes", param="image.image_digest")
        t, h, w = self.grid_thw
        if min(t, h, w) < 1 or h % merge_size or w % merge_size:
            raise invalid(
                f"image.grid {t}x{h}x{w} is not a whole number of {merge_size}x{merge_size} cells", param="image.grid"
            )
        if t * h * w != self.tokens * merge_size**2:
            raise invalid(
                f"image.tokens is {self.tokens}, grid {t}x{h}x{w} makes {t * h * w // merge_size**2}",
                param="image.tokens",
            )
