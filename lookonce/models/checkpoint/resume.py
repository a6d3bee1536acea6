"""Downloads large files of a hub repository into the hub library's cache, each from where an earlier attempt ended.

The library itself (2.x) throws away what a failed download has brought. Here the bytes of a file lie in its blob's
`.incomplete` file until it is whole; the library then finds the blob in its cache and only links it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lookonce.core.errors import CheckpointError

_AT_ONCE = 4  # files
_ENTITY_TAG = re.compile(r"[\w.-]+")
_SHA256 = re.compile(r"[0-9a-f]{64}")  # the entity tag of a large file is the digest of its contents


def download(repository: str, commit: str, names: Sequence[str]) -> None:
    """Bring the files' contents into the cache. Raises what the hub library raises, and what it was raised by."""
    from huggingface_hub import constants

    pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="download")
    try:
        missing = [name for name in names if not (_folder(repository) / "snapshots" / commit / name).exists()]
        jobs = [pool.submit(_download, repository, commit, name) for name in missing if not constants.HF_HUB_OFFLINE]
        for job in jobs:
            job.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _folder(repository: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE).expanduser() / repo_folder_name(repo_id=repository, repo_type="model")


def _download(repository: str, commit: str, name: str) -> None:
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # exported at run time

    url, folder = hf_hub_url(repository, name, revision=commit), _folder(repository)
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
