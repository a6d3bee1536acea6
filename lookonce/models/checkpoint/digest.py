"""Identity of a local checkpoint: a BLAKE3 digest of its config.json and safetensors contents, remembered on disk.

A file's digest is remembered by its path, size, mtime and inode, so that only the first start reads the other half's
weights.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from blake3 import blake3

from lookonce.core.atomic_files import write_durably
from lookonce.core.errors import CheckpointError
from lookonce.core.identity import Sealer, canonical_json

CACHE_DIR_VARIABLE = "LOOKONCE_CACHE_DIR"
_CHUNK_BYTES = 32 << 20
_SEALER = Sealer("checkpoint-digests")


def cache_dir() -> Path:
    """Where derived facts are remembered: $LOOKONCE_CACHE_DIR, by default ~/.cache/lookonce."""
    return Path(os.environ.get(CACHE_DIR_VARIABLE) or Path.home() / ".cache" / "lookonce")


def content_identity(files: Iterable[Path]) -> str:
    """`blake3:` and 64 hexadecimal characters over the names and contents of a checkpoint's files."""
    digests = {file.name: file_digest(file) for file in files}
    hasher = blake3(canonical_json(digests), derive_key_context="lookonce 2026 checkpoint identity")
    return f"blake3:{hasher.hexdigest()}"


def adapted(weights: str, adapter: str | None) -> str:
    """What identifies weights that an adapter was merged into; None: it changes none of them."""
    if adapter is None:
        return weights
    hasher = blake3(canonical_json([weights, adapter]), derive_key_context="lookonce 2026 adapted weights")
    return f"blake3:{hasher.hexdigest()}"


def file_digest(file: Path) -> str:
    """BLAKE3-256 of a file's contents in hexadecimal, from memory when the file hasn't changed since."""
    try:
        path = file.resolve(strict=True)
        state = path.stat()
        fields = {"path": str(path), "size": state.st_size, "mtime_ns": state.st_mtime_ns, "inode": state.st_ino}
        key = canonical_json(fields)
        memo = cache_dir() / "digests" / blake3(str(path).encode()).hexdigest()[:32]
        remembered = _recall(memo, key)
        if remembered is not None:
            return remembered
        digest = _hash(path)
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read ({error.strerror}); its contents identify the checkpoint"
        ) from None
    _remember(memo, _SEALER.seal(key, digest.encode("ascii")))
    return digest


def _hash(path: Path) -> str:
    # Reads through one buffer rather than a mapping: the pages of a mapping would count as this process's memory.
    hasher = blake3(max_threads=blake3.AUTO)
    buffer = memoryview(bytearray(min(_CHUNK_BYTES, max(path.stat().st_size, 1))))
    with open(path, "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            hasher.update(buffer[:count])
    return hasher.hexdigest()


def _recall(memo: Path, key: bytes) -> str | None:
    try:
        digest = _SEALER.open(key, memo.read_bytes())
    except OSError:
        return None
    return None if digest is None else bytes(digest).decode("ascii")


def _remember(memo: Path, sealed: bytes) -> None:
    # A cache that can't be written only means hashing again next time.
    with contextlib.suppress(OSError):
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_durably(memo, lambda file: file.write_bytes(sealed))
