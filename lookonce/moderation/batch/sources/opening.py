"""From what the user typed to a source."""

from __future__ import annotations

import os
from dataclasses import dataclass

from lookonce.core.errors import invalid
from lookonce.moderation.batch.sources.filesystems import has_magic, is_directory, scheme_of
from lookonce.moderation.batch.sources.folders import folder, globbed, is_image
from lookonce.moderation.batch.sources.items import Source
from lookonce.moderation.batch.sources.tables import Csv, JsonLines, Parquet, Table, TextList
from lookonce.moderation.batch.sources.tars import Tar

_TABLES: dict[str, type[Table]] = {
    ".txt": TextList,
    ".lst": TextList,
    ".jsonl": JsonLines,
    ".ndjson": JsonLines,
    ".csv": Csv,
    ".tsv": Csv,
    ".parquet": Parquet,
}


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

    def shard(one: str) -> Source:
        return _file(one, options)

    if has_magic(name):
        return globbed(name, shard)
    if is_directory(name):
        return folder(name, shard)
    if is_image(name):
        return globbed(name, shard)
    return shard(name)


def _file(name: str, options: SourceOptions) -> Source:
    lower = name.lower()
    if lower.endswith((".tar", ".tar.gz", ".tgz")):
        return Tar(name, max_bytes=options.max_bytes)
    kind = next((kind for suffix, kind in _TABLES.items() if lower.endswith(suffix)), None)
    if kind is None:
        known = ", ".join((*_TABLES, ".tar", ".tar.gz"))
        raise invalid(f"{name}: a source is a directory, a glob, or a file that ends in {known}", param="source")
    return kind(name, column=options.column, id_column=options.id_column, root=options.root)
