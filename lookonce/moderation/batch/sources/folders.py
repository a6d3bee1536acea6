"""Folders and globs: each file is an image; tar and Parquet files that a glob names are opened."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath

from blake3 import blake3

from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.moderation.batch.sources.filesystems import Entry, match, walk
from lookonce.moderation.batch.sources.items import Extent, FileAt, Locator, Source

IMAGES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif",
)  # fmt: skip
"""File names taken for images in folders and tar files; those that can't be decoded become rows that say so."""
SHARDS = (".tar", ".tar.gz", ".tgz", ".parquet")


def is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGES


def is_shard(name: str) -> bool:
    """A file of many images, by its suffix."""
    return name.lower().endswith(SHARDS)


class Files:
    """The images of a folder or glob."""

    def __init__(self, description: str, listing: Callable[[], Iterator[Entry]]) -> None:
        self.description = description
        self._listing = listing

    def extent(self) -> Extent:
        """Digest over names, sizes and times of change."""
        digest, count = blake3(), 0
        for entry in self._listing():
            digest.update(f"{entry.name}\0{entry.size}\0{entry.changed}\n".encode("utf-8", "surrogateescape"))
            count += 1
        return Extent(digest.hexdigest(), count)

    def entries(self) -> Iterator[tuple[str, Locator]]:
        for entry in self._listing():
            yield entry.name, FileAt(entry.name)


class Several:
    """Shards, one after the other."""

    def __init__(self, description: str, sources: Sequence[Source]) -> None:
        self.description = description
        self._sources = sources

    def extent(self) -> Extent:
        extents = [source.extent() for source in self._sources]
        digest = blake3("\n".join(extent.digest for extent in extents).encode()).hexdigest()
        counts = [extent.count for extent in extents]
        return Extent(digest, None if None in counts else sum(count or 0 for count in counts))

    def entries(self) -> Iterator[tuple[str, Locator]]:
        for source in self._sources:
            yield from source.entries()


def folder(name: str, open_shard: Callable[[str], Source]) -> Source:
    """The images below a directory or prefix; where there are none, its tar and Parquet files."""
    if any(is_image(entry.name) for entry in walk(name)):
        return Files(name, lambda: (entry for entry in walk(name) if is_image(entry.name)))
    shards = [entry.name for entry in walk(name) if is_shard(entry.name)]
    if not shards:
        wanted = ", ".join(IMAGES[:8])
        raise LookonceError(ErrorKind.NOT_FOUND, f"{name} holds no images ({wanted} ...) and no tar or Parquet files")
    return Several(name, [open_shard(shard) for shard in shards])


def globbed(pattern: str, open_shard: Callable[[str], Source]) -> Source:
    """Every file that a glob matches, whatever it is called; only shards where all are shards."""
    found = [entry.name for entry in match(pattern)]
    if not found:
        raise LookonceError(ErrorKind.NOT_FOUND, f"{pattern} matches no file", param="source")
    if all(is_shard(name) for name in found):
        return Several(pattern, [open_shard(name) for name in found])
    return Files(pattern, lambda: match(pattern))
