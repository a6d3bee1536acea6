"""Lists and tables: text files with a path or URL a line, and JSON lines, CSV and Parquet with a column of images."""

from __future__ import annotations

import base64
import binascii
import csv
import io
import os
import posixpath
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import orjson
from blake3 import blake3

from lookonce.core.errors import invalid
from lookonce.moderation.batch.sources.filesystems import open_file, scheme_of, stat, translated
from lookonce.moderation.batch.sources.items import Extent, FileAt, Inline, Locator, Unusable, WebUrl

COLUMNS = (
    "image", "path", "file", "file_name", "filename", "image_path", "filepath", "url", "image_url", "uri",
    "bytes", "image_bytes", "data", "content", "b64", "base64",
)  # fmt: skip
"""Names of the column with the images, the first that is there."""
_ENCODED = ("b64", "base64", "data", "bytes", "image_bytes", "content")
_CHUNK = 1 << 20
_BATCH_ROWS = 64


class Table(ABC):
    """Shared by all: where entries lead to. Relative paths are relative to the table, or to `root`."""

    def __init__(self, name: str, *, column: str | None = None, id_column: str | None = None, root: str = "") -> None:
        self.description = name
        self._column = column
        self._id = id_column
        self._root = root or os.path.dirname(name)

    def extent(self) -> Extent:
        """Digest of the whole file, and its entries counted."""
        digest = blake3()
        with open_file(self.description) as file, translated(self.description):
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        return Extent(digest.hexdigest(), sum(1 for _ in self.entries()))

    @abstractmethod
    def entries(self) -> Iterator[tuple[str, Locator]]:
        """One for each line or row."""

    def _row(self, number: int, row: dict[str, Any], column: str) -> tuple[str, Locator]:
        locator = self._locator(row.get(column), column)
        chosen = row.get(self._id) if self._id else None
        if chosen is not None:
            return str(chosen), locator
        if isinstance(locator, FileAt | WebUrl):
            return locator.url, locator
        return f"{self.description}#{number}", locator

    def _locator(self, value: Any, column: str) -> Locator:
        if isinstance(value, dict):  # Hugging Face's image feature
            value = value.get("bytes") or value.get("path") or value.get("url")
        if isinstance(value, bytes | bytearray | memoryview):
            return Inline(bytes(value))
        if not isinstance(value, str) or not value.strip():
            return Unusable(f"the column {column!r} holds neither a path, a URL nor bytes")
        value = value.strip()
        if value[:5].lower() == "data:":
            return _decoded(value.partition(",")[2])
        if column in _ENCODED and not scheme_of(value) and "." not in value:
            return _decoded(value)
        return self._place(value)

    def _place(self, value: str) -> Locator:
        scheme = scheme_of(value)
        if scheme in ("http", "https"):
            return WebUrl(value)
        if scheme == "file":
            return FileAt(value.partition("://")[2])
        if scheme or os.path.isabs(value):
            return FileAt(value)
        if scheme_of(self._root):
            scheme, _, root = self._root.partition("://")
            return FileAt(f"{scheme}://{posixpath.normpath(posixpath.join(root, value))}")
        return FileAt(os.path.normpath(os.path.join(self._root, value)))

    def _choose(self, names: list[str]) -> str:
        """The column with the images. Raises INVALID_ARGUMENT naming those that are there."""
        known = ", ".join(names[:20]) or "none"
        for wanted in (self._column, self._id):
            if wanted is not None and wanted not in names:
                raise invalid(f"{self.description} has no column {wanted!r}; it has {known}", param="column")
        column = self._column or next((name for name in COLUMNS if name in names), None)
        if column is None:
            raise invalid(f"{self.description}: name the column of the images with --column; it has {known}")
        return column


class TextList(Table):
    """A path or URL a line; empty lines and those that begin with # are passed over."""

    def entries(self) -> Iterator[tuple[str, Locator]]:
        with open_file(self.description) as file, translated(self.description):
            for raw in file:
                line = raw.decode("utf-8", "surrogateescape").strip()
                if line and not line.startswith("#"):
                    locator = self._place(line)
                    yield getattr(locator, "url", line), locator


class JsonLines(Table):
    """An object a line; bytes as base64 or data: URL."""

    def entries(self) -> Iterator[tuple[str, Locator]]:
        column: str | None = None
        number = 0
        with open_file(self.description) as file, translated(self.description):
            for line in file:
                if not line.strip():
                    continue
                try:
                    row = orjson.loads(line)
                except orjson.JSONDecodeError:
                    row = None
                if not isinstance(row, dict):
                    yield f"{self.description}#{number}", Unusable("the line is not a JSON object")
                else:
                    column = column or self._choose(list(row))
                    yield self._row(number, row, column)
                number += 1


class Csv(Table):
    """With a header; separated by commas, semicolons or tabs, whatever the header has most of."""

    def entries(self) -> Iterator[tuple[str, Locator]]:
        with open_file(self.description) as file, translated(self.description):
            text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
            header = text.readline()
            mark = max(",;\t", key=header.count)
            names = next(csv.reader([header], delimiter=mark), [])
            column = self._choose(names)
            csv.field_size_limit(1 << 30)
            try:
                for number, row in enumerate(csv.DictReader(text, names, delimiter=mark)):
                    yield self._row(number, row, column)
            except csv.Error as error:
                raise invalid(f"{self.description} is not a CSV file", param="source") from error


class Parquet(Table):
    """A column of paths, URLs, bytes or Hugging Face's structs of both; read in small batches."""

    def extent(self) -> Extent:
        """Digest of size and time of change: the file may be large."""
        entry = stat(self.description)
        with self._open() as file:
            count = file.metadata.num_rows
        return Extent(blake3(f"{entry.size}\0{entry.changed}\0{count}".encode()).hexdigest(), count)

    def entries(self) -> Iterator[tuple[str, Locator]]:
        with self._open() as file:
            column = self._choose(list(file.schema_arrow.names))
            wanted = [column, self._id] if self._id else [column]
            number = 0
            with translated(self.description):
                for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=wanted):
                    for row in batch.to_pylist():
                        yield self._row(number, row, column)
                        number += 1

    @contextmanager
    def _open(self) -> Iterator[Any]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with open_file(self.description) as stream:
            try:
                file = pq.ParquetFile(stream, pre_buffer=False)
            except pa.ArrowInvalid as error:
                raise invalid(f"{self.description} is not a Parquet file", param="source") from error
            yield file


def _decoded(text: str) -> Locator:
    try:
        return Inline(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError):
        return Unusable("the bytes are not valid base64")
