"""The names vLLM knows images by. An erased image's name is never given again, so nothing kept under it is found."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from blake3 import blake3

from lookonce.core.identity import EmbeddingReference

_REMEMBERED = 1_000_000
"""Erased keys and digests that are remembered one by one: some 150 MB. Beyond them every image gets a new name."""


class Identifiers:
    """64 hexadecimal characters: a digest of embedding key, image digest and erasures, keyed for this process."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)
        self._erased: dict[bytes, int] = {}

    def of(self, reference: EmbeddingReference) -> str:
        """The name of an image's rows, now."""
        epochs = (self._erased.get(name, 0).to_bytes(8, "little") for name in (reference.key, reference.image_digest))
        return blake3(reference.key + reference.image_digest + b"".join(epochs), key=self._secret).hexdigest()

    def erase(self, names: Sequence[bytes]) -> None:
        """Images of these embedding keys and image digests get other names."""
        if len(self._erased) + len(names) > _REMEMBERED:
            self._erased.clear()
            self._secret = secrets.token_bytes(32)
        for name in names:
            self._erased[name] = self._erased.get(name, 0) + 1
