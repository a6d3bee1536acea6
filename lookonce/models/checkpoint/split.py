"""Writes the two halves of a checkpoint as checkpoint directories of their own, tensor bytes and identity preserved."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lookonce.core.atomic_files import sync
from lookonce.core.errors import CheckpointError
from lookonce.models.checkpoint import files, recorded
from lookonce.models.checkpoint.check import check_checkpoint
from lookonce.models.checkpoint.checkpoint import Checkpoint, identity_record
from lookonce.models.checkpoint.writing import DEFAULT_SHARD_BYTES, TensorSpec, plan_by_bytes, write_json, write_shards
from lookonce.models.registry import Half

Progress = Callable[[Half, int, int], None]
"""Called with the half being written, its bytes written so far and its bytes in all."""


@dataclass(frozen=True)
class SplitReport:
    """What a split wrote: per half its directory, bytes of weights, tensors and shards; and what both halves state."""

    identity: str  # of the source
    vision_weights: str  # digest of the vision half's tensors
    paths: dict[Half, Path]
    weight_bytes: dict[Half, int]
    tensors: dict[Half, int]
    shards: dict[Half, int]


def split_checkpoint(
    model: str,
    out: str | Path,
    *,
    revision: str | None = None,
    force: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
) -> SplitReport:
    """Write OUT/vision and OUT/language from a local directory or hub id that holds both halves.

    Everything is written beside `out` first and renamed into place when it is whole, so `out` never holds half a split.
    Memory stays within one piece of one tensor. Each half states the source's identity and the digest of the vision
    half's tensors (lookonce.json): the fingerprint is the same from the halves and from the whole. What
    `lookonce verify --record` wrote beside the whole goes along. Raises CheckpointError when `out` exists and isn't
    empty, unless `force` is given and it holds an earlier split; and when the source lacks a half.
    """
    out = Path(out).expanduser().absolute()
    found = check_checkpoint(model, revision=revision).usable()
    if found[Half.VISION] is not found[Half.LANGUAGE]:
        raise CheckpointError(f"{model} is split already; use its halves as they are")
    checkpoint = found[Half.VISION]
    _check_target(out, checkpoint, force)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        temporary.chmod(0o755)
        shards = {half: _write_half(checkpoint, half, temporary / half, max_shard_bytes, progress) for half in Half}
        _replace(out, temporary)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written ({error.strerror}); check space and permissions") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return SplitReport(
        identity=checkpoint.identity,
        vision_weights=checkpoint.known_vision_weights(),
        paths={half: out / half for half in Half},
        weight_bytes={half: checkpoint.weight_bytes(half) for half in Half},
        tensors={half: len(checkpoint.stored_entries(half)) for half in Half},
        shards=shards,
    )


def _check_target(out: Path, checkpoint: Checkpoint, force: bool) -> None:
    source = checkpoint.path.resolve()
    target = out.resolve()
    if source == target or target in source.parents:
        raise CheckpointError(f"{out} holds the checkpoint that is being split; choose another directory")
    if not out.exists():
        return
    if not out.is_dir():
        raise CheckpointError(f"{out} is a file; choose a directory")
    names = {entry.name for entry in out.iterdir()}
    if not names:
        return
    if not force:
        raise CheckpointError(f"{out} is not empty; choose another directory or allow overwriting with --force")
    earlier = all((out / half / files.IDENTITY).is_file() for half in Half)
    if names != {half.value for half in Half} or not earlier:
        raise CheckpointError(f"{out} holds something other than an earlier split, which is never overwritten")


def _write_half(
    checkpoint: Checkpoint, half: Half, directory: Path, max_shard_bytes: int, progress: Progress | None
) -> int:
    directory.mkdir()
    entries = {entry.stored_name: entry for entry in checkpoint.stored_entries(half).values()}
    tensors = [TensorSpec(name, entry.dtype, entry.shape) for name, entry in sorted(entries.items())]
    total, done = checkpoint.weight_bytes(half), 0

    def data(tensor: TensorSpec) -> Iterator[bytes]:
        nonlocal done
        for piece in entries[tensor.name].pieces():
            yield piece
            done += len(piece)
            if progress is not None:
                progress(half, done, total)

    shards = list(write_shards(directory, plan_by_bytes(tensors, max_shard_bytes), data))
    for shard in shards:
        sync(shard)
    for name in files.small_files({half}):
        if name != files.IDENTITY and (checkpoint.path / name).is_file():
            (directory / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(checkpoint.path / name, directory / name)
    if recorded.read(checkpoint, half) is not None:  # both halves state what it is of
        shutil.copyfile(checkpoint.path / recorded.FILES[half], directory / recorded.FILES[half])
    write_json(directory / files.IDENTITY, identity_record(checkpoint, half))
    return len(shards)


def _replace(out: Path, temporary: Path) -> None:
    """Rename the finished directory into place; an earlier split steps aside first and is put back if that fails."""
    if not out.exists():
        os.rename(temporary, out)
        return
    aside = temporary.with_name(temporary.name + "-old")
    os.rename(out, aside)
    try:
        os.rename(temporary, out)
    except OSError:
        os.rename(aside, out)
        raise
    shutil.rmtree(aside, ignore_errors=True)
