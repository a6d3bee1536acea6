"""Records to store."""

from __future__ import annotations

import os

from lookonce.core.record import EMBEDDING, ITEM_BYTES, EmbeddingRecord, TensorView


def make_record(
    tokens: int = 4, hidden: int = 64, dtype: str = "BF16", deepstack: int = 0, key: bytes = bytes(32)
) -> EmbeddingRecord:
    """A record of random bytes."""
    names = [EMBEDDING, *(f"deepstack_{n}" for n in range(deepstack))]
    size = tokens * hidden * ITEM_BYTES[dtype]
    return EmbeddingRecord(
        key=key,
        fingerprint=os.urandom(32).hex(),
        image_digest=os.urandom(32),
        grid_thw=(1, 2, 2 * tokens),
        width=100,
        height=50,
        tokens=tokens,
        tensors={name: TensorView(dtype, (tokens, hidden), memoryview(os.urandom(size))) for name in names},
    )
