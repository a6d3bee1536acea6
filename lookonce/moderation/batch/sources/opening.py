"""From what the user typed to a source.

Of folders and globs each file is an image; tar and Parquet files that a glob names are opened.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from blake3 import blake3

from lookonce.core.errors import ErrorKind, LookonceError, invalid
from lookonce.moderation.batch.sources.filesystems import Entry, has_magic, is_directory, match, scheme_of, walk
from lookonce.moderation.batch.sources.items import IMAGES, Extent, FileAt, Locator, Source, is_image
from lookonce.moderation.batch.sources.tables import Csv, JsonLines, Parquet, Table, TextList
from lookonce.moderation.batch.sources.tars import Tar

_TARS = (".tar", ".tar.gz", ".tgz")
_TABLES: dict[str, type[Table]] = {
    ".txt": TextList,
    ".lst": TextList,
    ".jsonl": JsonLines,
    ".ndjson": JsonLines,
    ".csv": Csv,
    ".tsv": Csv,
    ".parquet": Parquet,
}


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


@dataclass(frozen=True)
class SourceOptions:
    """How a source is read."""

    column: str | None = None  # of the images, in a table
    id_column: str | None = None  # what rows are called in the results
    root: str = ""  # what relative paths of a list or table are relative to
    max_bytes: int = 20 << 20  # of one image


def open_source(name: str, options: SourceOptions | None = None) -> Source:
    """A directory, glob, list, table or tar. Raises INVALID_ARGUMENT or NOT_FOUND. Blocking."""
    options = options or SourceOptions()
    if not scheme_of(name):
        name = os.path.abspath(os.path.expanduser(name))
    elif scheme_of(name) in ("http", "https"):
        raise invalid(f"{name}: write URLs into a text file, one a line, and give that", param="source")

    pattern = has_magic(name)
    if not pattern and is_directory(name):
        return _folder(name, options)
    return _globbed(name, options) if pattern or is_image(name) else _file(name, options)


def _folder(name: str, options: SourceOptions) -> Source:
    """The images below a directory or prefix; where there are none, its tar and Parquet files."""
    if any(is_image(entry.name) for entry in walk(name)):
        return Files(name, lambda: (entry for entry in walk(name) if is_image(entry.name)))
    shards = [entry.name for entry in walk(name) if _is_shard(entry.name)]
    if not shards:
        wanted = ", ".join(IMAGES[:8])
        raise LookonceError(ErrorKind.NOT_FOUND, f"{name} holds no images ({wanted} ...) and no tar or Parquet files")
    return Several(name, [_file(shard, options) for shard in shards])


def _globbed(pattern: str, options: SourceOptions) -> Source:
    """Every file that a glob matches, whatever it is called; only shards where all are shards."""
    found = [entry.name for entry in match(pattern)]
    if not found:
        raise LookonceError(ErrorKind.NOT_FOUND, f"{pattern} matches no file", param="source")
    if all(_is_shard(name) for name in found):
        return Several(pattern, [_file(name, options) for name in found])
    return Files(pattern, lambda: match(pattern))


def _is_shard(name: str) -> bool:
    return name.lower().endswith((*_TARS, ".parquet"))


def _file(name: str, options: SourceOptions) -> Source:
    lower = name.lower()
    if lower.endswith(_TARS):
        return Tar(name, max_bytes=options.max_bytes)
    kind = next((kind for suffix, kind in _TABLES.items() if lower.endswith(suffix)), None)
    if kind is None:
        known = ", ".join((*_TABLES, ".tar", ".tar.gz"))
        raise invalid(f"{name}: a source is a directory, a glob, or a file that ends in {known}", param="source")
    return kind(name, column=options.column, id_column=options.id_column, root=options.root)
