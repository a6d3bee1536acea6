"""What identifies weights: a digest of a checkpoint's config.json and safetensors contents, which is the checkpoint's
identity, and one of the tensors of a half, which is the same in all checkpoints that have those tensors.

BLAKE3-256, remembered on disk by the files' paths, sizes, times of change and inodes, so that only the first start
reads weights for it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from blake3 import blake3

from lookonce.core.atomic_files import write_durably
from lookonce.core.errors import CheckpointError
from lookonce.core.identity import Sealer, canonical_json
from lookonce.models.checkpoint.headers import TensorEntry

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
        return _remembered(str(path), canonical_json(_state(path)), lambda: _hash(path))
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read ({error.strerror}); its contents identify the checkpoint"
        ) from None


def tensors_digest(entries: Mapping[str, TensorEntry], read_as: Mapping[str, str] | None = None) -> str:
    """`blake3:` and 64 hexadecimal characters over name in the module, stored dtype, shape and bytes of each tensor.

    `read_as` says of matrices that are stored quantised what else decides their values. In which files the tensors
    lie, in which order and under which names there, doesn't matter; nor does what lies beside them. From memory when
    those files haven't changed since. Raises CheckpointError.
    """
    files = sorted({entry.file for entry in entries.values()})
    try:
        states = [_state(file.resolve(strict=True)) for file in files]
        layout = {
            name: [entry.dtype, list(entry.shape), files.index(entry.file), entry.offset]
            for name, entry in entries.items()
        }
        place = canonical_json(["tensors", [state["path"] for state in states], sorted(entries)]).decode()
        key = canonical_json([states, layout, read_as])
        return _remembered(place, key, lambda: _hash_tensors(entries, read_as))
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read ({error.strerror}); its tensors identify it") from None


def vision_weights_of(checkpoint: str) -> str | None:
    """What `remember_vision_weights` was told of a checkpoint on this host; None: nothing."""
    return _recall(*_of_checkpoint(checkpoint))


def remember_vision_weights(checkpoint: str, digest: str) -> None:
    """Write down the `tensors_digest` of a hub commit's vision half, for the language half alone on this host.

    `checkpoint` is an identity that stands for its contents for ever: `hub:repo@commit`.
    """
    if vision_weights_of(checkpoint) != digest:
        _remember(*_of_checkpoint(checkpoint), digest)


def _hash(path: Path) -> str:
    # Reads through one buffer rather than a mapping: the pages of a mapping would count as this process's memory.
    hasher = blake3(max_threads=blake3.AUTO)
    buffer = memoryview(bytearray(min(_CHUNK_BYTES, max(path.stat().st_size, 1))))
    with open(path, "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            hasher.update(buffer[:count])
    return hasher.hexdigest()


def _hash_tensors(entries: Mapping[str, TensorEntry], read_as: Mapping[str, str] | None) -> str:
    """Each tensor has a digest of its own, so that they can be read in the order in which they lie."""
    digests = {}
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].file, item[1].offset)):
        hasher = blake3(max_threads=blake3.AUTO)
        for piece in entry.pieces():
            hasher.update(piece)
        digests[name] = [entry.dtype, list(entry.shape), hasher.hexdigest()]
    text = canonical_json([digests, read_as] if read_as else digests)
    return f"blake3:{blake3(text, derive_key_context='lookonce 2026 tensors').hexdigest()}"


def _state(path: Path) -> dict[str, str | int]:
    state = path.stat()
    return {"path": str(path), "size": state.st_size, "mtime_ns": state.st_mtime_ns, "inode": state.st_ino}


def _remembered(place: str, key: bytes, make: Callable[[], str]) -> str:
    memo = _memo(place)
    digest = _recall(memo, key)
    if digest is None:
        digest = make()
        _remember(memo, key, digest)
    return digest


def _memo(place: str) -> Path:
    return cache_dir() / "digests" / blake3(place.encode()).hexdigest()[:32]


def _of_checkpoint(checkpoint: str) -> tuple[Path, bytes]:
    key = canonical_json(["vision weights", checkpoint])
    return _memo(key.decode()), key


def _recall(memo: Path, key: bytes) -> str | None:
    try:
        digest = _SEALER.open(key, memo.read_bytes())
    except OSError:
        return None
    return None if digest is None else bytes(digest).decode("ascii")


def _remember(memo: Path, key: bytes, digest: str) -> None:
    # A cache that can't be written only means hashing again next time.
    with contextlib.suppress(OSError):
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_durably(memo, lambda file: file.write_bytes(_SEALER.seal(key, digest.encode("ascii"))))
