"""Fetches from the hub only the files that a half needs, all at one commit. Maps the hub library's failures to ours.

Large files go on from where an earlier attempt ended: the library itself (2.x) throws away what a failed download has
brought. Here the bytes of a file lie in its blob's `.incomplete` file until it is whole; the library then finds the
blob in its cache and only links it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lookonce.core.errors import CheckpointError
from lookonce.models.checkpoint import files
from lookonce.models.checkpoint.ranges import Part, fetch_part, part_of
from lookonce.models.registry import Family, Half, family_of

_log = logging.getLogger(__name__)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_AT_ONCE = 4  # files
_ENTITY_TAG = re.compile(r"[\w.-]+")
_SHA256 = re.compile(r"[0-9a-f]{64}")  # the entity tag of a large file is the digest of its contents
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_repository(model: str) -> bool:
    """Whether the text has the form of a hub id: `owner/name`."""
    return _REPOSITORY.fullmatch(model) is not None and ".." not in model


def identity(repository: str, commit: str) -> str:
    """What a hub repository at a commit is identified by."""
    return f"hub:{repository}@{commit}"


def snapshot_source(path: Path, weights: Iterable[Path]) -> tuple[str, str] | None:
    """Identity and repository of a directory that is a snapshot in the hub library's cache; None: it is not one.

    Such a directory's files are links to the cache's blobs. One that was put there by hand makes it another model.
    """
    real = path.resolve()
    repository = real.parent.parent.name.removeprefix("models--").replace("--", "/")
    cached = real.parent.name == "snapshots" and real.parent.parent.name.startswith("models--")
    if not (cached and is_repository(repository) and _COMMIT.fullmatch(real.name)):
        return None
    linked = (os.readlink(file) if file.is_symlink() else "" for file in weights if file.exists())
    if not all(Path(target).parent.name == "blobs" for target in linked):
        return None
    return identity(repository, real.name), repository


def fetch(repository: str, halves: Iterable[Half], revision: str | None = None) -> tuple[Path, str]:
    """Bring the given halves of a hub repository into the hub library's cache.

    Returns the snapshot's directory and the commit it stands for. Without a connection a snapshot that is already
    cached serves. Raises CheckpointError for a repository that is unknown, gated, unreachable, or without safetensors.
    """
    from huggingface_hub import snapshot_download

    halves = set(halves)
    snapshot = fetch_files(repository, [*files.small_files(halves), files.INDEX, files.ADAPTER], revision)
    commit = snapshot.name
    with _translated(repository, revision):
        wanted = _weights(repository, snapshot, halves)
        alone = _half_alone(repository, snapshot, wanted, *halves) if len(halves) == 1 else None
        if alone is not None:
            return alone, commit
        # Asked for by commit, so that a push between the calls can't mix two versions.
        _download_all(repository, commit, wanted)
        snapshot = Path(snapshot_download(repository, revision=commit, allow_patterns=wanted))
    missing = [name for name in wanted if not (snapshot / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{repository}@{commit[:12]}: could not get {', '.join(missing)}: either the hub can't be reached and they "
            "were never downloaded, or the repository has only pickled weights (.bin), which are never loaded"
        )
    _log.info("fetched %s at %s: %d weight files", repository, commit[:12], len(wanted))
    return snapshot, commit


def fetch_files(repository: str, names: list[str], revision: str | None = None) -> Path:
    """Bring files of these names, those of them that there are, into the cache; the snapshot's directory."""
    from huggingface_hub import snapshot_download

    with _translated(repository, revision):
        return Path(snapshot_download(repository, revision=revision, allow_patterns=names))


def _weights(repository: str, snapshot: Path, halves: set[Half]) -> list[str]:
    if not (snapshot / files.CONFIG).is_file():
        if (snapshot / files.ADAPTER).is_file():
            base = files.read_json(snapshot / files.ADAPTER).get("base_model_name_or_path")
            raise CheckpointError(
                f"{repository} is a LoRA adapter of {base}; give that model with --model {base} and this with "
                f"--adapter {repository}"
            )
        raise CheckpointError(f"{repository} has no {files.CONFIG}: it is not a model repository")
    index = snapshot / files.INDEX
    if not index.is_file():
        return [files.SINGLE]
    family = family_of(files.read_json(snapshot / files.CONFIG), snapshot)
    return files.shards_of(family, files.read_index(index), halves)


@contextlib.contextmanager
def _translated(repository: str, revision: str | None) -> Iterator[None]:
    import httpx2
    from huggingface_hub import constants, errors

    at = f" at revision {revision!r}" if revision else ""
    try:
        yield
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{repository} is gated: accept its terms on its hub page, then set HF_TOKEN or run `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{repository} was not found on the hub: check the spelling; for a private one set HF_TOKEN; "
            "for a local directory give its path, starting with ./ or /"
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{repository} has no revision {revision!r} on the hub") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no status"
        raise CheckpointError(f"{repository}{at}: the hub answered HTTP {status}; try again later") from None
    except (httpx2.ReadTimeout, httpx2.WriteTimeout):
        raise CheckpointError(
            f"{repository}{at}: the download stalled: the hub sent nothing for {constants.HF_HUB_DOWNLOAD_TIMEOUT} s "
            "(HF_HUB_DOWNLOAD_TIMEOUT), several times; run it again: it goes on where it ended"
        ) from None
    except (httpx2.ReadError, httpx2.WriteError, httpx2.RemoteProtocolError):
        raise CheckpointError(
            f"{repository}{at}: the connection to the hub broke off during the download; "
            "run it again: it goes on where it ended"
        ) from None
    except (
        errors.LocalEntryNotFoundError,
        ConnectionError,
        TimeoutError,
        httpx2.TransportError,
        httpx2.InvalidURL,
    ):
        raise CheckpointError(
            f"{repository}{at} is not in the hub cache and the hub can't be reached: "
            "check the network (and HF_ENDPOINT, HF_HUB_OFFLINE), or give a local directory"
        ) from None
    except OSError as error:
        if not error.errno:  # the library's own: a file of another size than was announced
            raise CheckpointError(f"{repository}{at}: a download was cut short; run it again") from None
        why = os.strerror(error.errno)
        raise CheckpointError(
            f"{repository}{at}: the hub cache {constants.HF_HUB_CACHE} can't be written ({why}): "
            "make room there, give it to this process's user, or set HF_HOME to another directory"
        ) from None
    except errors.HFValidationError:
        raise CheckpointError(
            f"{repository!r} is not a hub id (owner/name) and no local directory has that name"
        ) from None


def _half_alone(repository: str, snapshot: Path, wanted: Sequence[str], half: Half) -> Path | None:
    """A directory with one half alone, where shards hold much of the other one too; None if they don't, or if they are
    here already. Raises what the hub library raises."""
    from huggingface_hub import constants
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # exported at run time

    if all((snapshot / name).is_file() for name in wanted):
        return None
    others = _weights(repository, snapshot, {half.other})
    if not set(wanted) & set(others):
        return None
    folder = _cache_folder(repository) / "halves" / snapshot.name / half.value
    if folder.is_dir() or constants.HF_HUB_OFFLINE:
        return folder if folder.is_dir() else None
    lock = _cache_folder(repository).parent / ".locks" / _cache_folder(repository).name / f"{snapshot.name}.{half}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        return folder if folder.is_dir() or _fill(folder, repository, snapshot, wanted, half, set(others)) else None


def _fill(
    folder: Path, repository: str, snapshot: Path, wanted: Sequence[str], half: Half, others: Collection[str]
) -> bool:
    """Make the directory of a half, which shares shards with `others`; whether that is worth it. It has its name once
    it is whole."""
    growing = folder.with_name(f"{half}.incomplete")
    growing.mkdir(parents=True, exist_ok=True)
    family = family_of(files.read_json(snapshot / files.CONFIG), snapshot)
    found = {name: _part(repository, snapshot, name, family, half, growing) for name in wanted if name in others}
    parts = {name: pair for name, pair in found.items() if pair is not None and pair[1].worth}
    if not parts:
        return False
    for name, (url, part) in parts.items():
        if not (growing / name).is_file():
            fetch_part(url, part, growing / name)
    whole = [name for name in wanted if name not in parts]
    _download_all(repository, snapshot.name, whole)
    fetch_files(repository, whole, snapshot.name)
    for file in snapshot.iterdir():
        if (
            file.name not in parts
            and file.name != files.INDEX
            and (file.suffix != ".safetensors" or file.name in whole)
        ):
            link = growing / file.name
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(file, folder))
    os.replace(growing, folder)
    saved = sum(part.others for _, part in parts.values())
    _log.info("fetched the %s half of %s alone: %d bytes less than its shards", half, repository, saved)
    return True


def _part(
    repository: str, snapshot: Path, name: str, family: Family, half: Half, growing: Path
) -> tuple[str, Part] | None:
    """Where a shard is, and what it holds of a half; None if it is here, or can't be had in parts."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    if (snapshot / name).is_file():
        return None
    url = hf_hub_url(repository, name, revision=snapshot.name)
    try:
        about = get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except EntryNotFoundError:
        return None  # found missing once everything is there that can be
    if about.size is None or about.etag is None:
        return None
    part = part_of(url, about.size, about.etag, family, half, growing / f"{name}.header")
    return None if part is None else (url, part)


def _download_all(repository: str, commit: str, names: Sequence[str]) -> None:
    """Bring the files' contents into the cache. Raises what the hub library raises, and what it was raised by."""
    from huggingface_hub import constants

    pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="download")
    try:
        missing = [name for name in names if not (_cache_folder(repository) / "snapshots" / commit / name).exists()]
        jobs = [pool.submit(_download, repository, commit, name) for name in missing if not constants.HF_HUB_OFFLINE]
        for job in jobs:
            job.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _cache_folder(repository: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE).expanduser() / repo_folder_name(repo_id=repository, repo_type="model")


def _download(repository: str, commit: str, name: str) -> None:
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # exported at run time

    url, folder = hf_hub_url(repository, name, revision=commit), _cache_folder(repository)
    try:
        about = get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except EntryNotFoundError:
        return  # found missing once everything is there that can be
    if (
        about.size is None
        or about.size > constants.MAX_HTTP_DOWNLOAD_SIZE
        or not _ENTITY_TAG.fullmatch(about.etag or "")
    ):
        return  # the library has other ways
    blob = folder / "blobs" / str(about.etag)
    lock = folder.parent / ".locks" / folder.name / f"{about.etag}.lock"
    for file in (blob, lock):
        file.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):  # the library's own, so that processes that want the same file wait for each other
        if not blob.exists():
            _complete(url, blob, about.size, name)


def _complete(url: str, blob: Path, size: int, name: str) -> None:
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # likewise

    partial = blob.with_name(f"{blob.name}.incomplete")
    with open(partial, "ab") as stream:
        if stream.tell() > size:
            stream.truncate(0)
            stream.seek(0)
        begun = stream.tell()
        headers = build_hf_headers() | {"accept-encoding": "identity"}  # ranges are of the file itself
        http_get(url, stream, resume_size=begun, headers=headers, expected_size=size, displayed_filename=name)
    if begun and _SHA256.fullmatch(blob.name) and _sha256(partial) != blob.name:
        partial.unlink()
        raise CheckpointError(f"{name}: what an earlier download had left was damaged, and is removed; run it again")
    os.replace(partial, blob)


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
