"""Local paths and fsspec URLs behind one face: open, list, stat. Only schemes that are meant to be sources are taken.

`s3://` needs the extra `lookonce[s3]`, `gs://` the extra `lookonce[gcs]`.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from lookonce.core.errors import ErrorKind, LookonceError, invalid
from lookonce.moderation.batch.sources.buckets import BUCKETS, fault, open_bucket, read_object

_SCHEMES = ("memory", "abfs", "az", "hdfs", "file")
_MAGIC = "*?["


@dataclass(frozen=True)
class Entry:
    """A file of a listing. `name` is its path or URL."""

    name: str
    size: int
    changed: str  # time of change or entity tag


def scheme_of(name: str) -> str:
    """ "s3" of s3://bucket/key; "" of a path."""
    head, separator, _ = name.partition("://")
    return head.lower() if separator and head.isalnum() else ""


def has_magic(name: str) -> bool:
    """Whether it is a glob. A local file that is really called so is a file."""
    return any(mark in name for mark in _MAGIC) and not (scheme_of(name) == "" and Path(name).exists())


@lru_cache(maxsize=32)
def _filesystem(scheme: str) -> Any:
    if scheme in BUCKETS:
        return open_bucket(scheme)
    import fsspec

    if scheme not in _SCHEMES:
        raise invalid(f"{scheme}://: sources are paths, {', '.join(f'{s}://' for s in ('s3', 'gs'))}", param="source")
    try:
        return fsspec.filesystem(scheme)
    except ImportError as error:
        remedy = f"install fsspec's package for {scheme}"
        raise invalid(f"{scheme}:// needs a package that is not installed: {remedy}", param="source") from error


def _split(name: str) -> tuple[Any, str]:
    scheme = scheme_of(name)
    filesystem = _filesystem(scheme)
    return filesystem, str(filesystem._strip_protocol(name))


def is_directory(name: str) -> bool:
    """Whether images may lie below it. Raises NOT_FOUND when there is nothing of that name."""
    if not scheme_of(name):
        path = Path(name)
        if not path.exists():
            raise LookonceError(ErrorKind.NOT_FOUND, f"{name}: no such file or directory", param="source")
        return path.is_dir()
    with translated(name):
        filesystem, path_of = _split(name)
        if filesystem.isdir(path_of):
            return True
        if not filesystem.exists(path_of):
            raise LookonceError(ErrorKind.NOT_FOUND, f"{name}: no such bucket, object or prefix", param="source")
        return False


def stat(name: str) -> Entry:
    """Size and time of change of one file."""
    with translated(name):
        if not scheme_of(name):
            found = os.stat(name)
            return Entry(name, found.st_size, str(found.st_mtime_ns))
        filesystem, path = _split(name)
        return _entry(scheme_of(name), filesystem.info(path))


def open_file(name: str) -> IO[bytes]:
    with translated(name):
        if not scheme_of(name):
            return open(name, "rb")
        filesystem, path = _split(name)
        opened: IO[bytes] = filesystem.open(path, "rb")
        return opened


def read_span(name: str, offset: int, size: int) -> bytes:
    """At most `size` bytes from `offset` on."""
    with translated(name):
        if not scheme_of(name):
            with open(name, "rb") as file:
                file.seek(offset)
                return file.read(size)
        filesystem, path = _split(name)
        if scheme_of(name) in BUCKETS:
            return read_object(filesystem, path, offset, size)
        known = filesystem.info(path)["size"]  # some filesystems refuse a range beyond the end
        if offset >= known:
            return b""
        data: bytes = filesystem.cat_file(path, start=offset, end=min(known, offset + size))
        return data


def walk(name: str) -> Iterator[Entry]:
    """All files below a directory or prefix: in each directory by name, directories among the files. Hidden ones
    (with a leading dot) are left out."""
    if scheme_of(name):
        filesystem, path = _split(name)
        yield from _walk_remote(filesystem, scheme_of(name), path)
    else:
        yield from _walk_local(name)


def _walk_local(directory: str) -> Iterator[Entry]:
    with translated(directory), os.scandir(directory) as found:
        entries = sorted((entry for entry in found if entry.name[0] != "."), key=lambda entry: entry.name)
    for entry in entries:
        path = os.path.join(directory, entry.name)
        if entry.is_dir():
            if not entry.is_symlink():  # a link may lead back up
                yield from _walk_local(path)
        else:
            try:
                found_stat = entry.stat()
            except OSError:  # gone, or a link to nothing: whoever reads it says so
                yield Entry(path, 0, "")
            else:
                yield Entry(path, found_stat.st_size, str(found_stat.st_mtime_ns))


def _walk_remote(filesystem: Any, scheme: str, path: str) -> Iterator[Entry]:
    with translated(f"{scheme}://{path}"):
        found = filesystem.ls(path, detail=True)
    entries = [one for one in found if one["name"].rstrip("/") != path.rstrip("/")]
    for entry in sorted(entries, key=lambda one: str(one["name"])):
        last = str(entry["name"]).rstrip("/").rpartition("/")[2]
        if not last or last[0] == ".":
            continue
        if entry["type"] == "directory":
            yield from _walk_remote(filesystem, scheme, str(entry["name"]))
        else:
            yield _entry(scheme, entry)


def match(pattern: str) -> Iterator[Entry]:
    """Files that a glob matches (`**` crosses directories), by name."""
    if scheme_of(pattern):
        filesystem, path = _split(pattern)
        with translated(pattern):
            found = filesystem.glob(path, detail=True)
        for name in sorted(found):
            if found[name]["type"] != "directory":
                yield _entry(scheme_of(pattern), found[name])
        return
    for name in sorted(glob.iglob(os.path.expanduser(pattern), recursive=True)):
        if not os.path.isdir(name):
            yield stat(name) if os.path.exists(name) else Entry(name, 0, "")


def _entry(scheme: str, info: Any) -> Entry:
    changed = next((info[key] for key in ("ETag", "etag", "LastModified", "updated", "mtime") if info.get(key)), "")
    name = str(info["name"])
    path = name if scheme == "file" else name.lstrip("/")
    return Entry(f"{scheme}://{path}", int(info.get("size") or 0), str(changed))


@contextmanager
def translated(name: str) -> Iterator[None]:
    """Whatever a file system raises, as a LookonceError that names the file; our own pass."""
    try:
        yield
    except LookonceError:
        raise
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise LookonceError(ErrorKind.NOT_FOUND, f"{name}: no such file", param="source") from error
    except Exception as error:  # foreign: fsspec's file systems raise their libraries' own
        scheme = scheme_of(name)
        if scheme in BUCKETS:
            raise fault(name, scheme, error) from error
        if isinstance(error, PermissionError):
            text = f"{name}: this user may not read it"
            raise LookonceError(ErrorKind.PERMISSION_DENIED, text, param="source") from error
        raise LookonceError(ErrorKind.UNAVAILABLE, f"{name}: cannot be read right now", param="source") from error
