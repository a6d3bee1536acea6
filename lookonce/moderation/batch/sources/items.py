"""One image to be judged: its place in the source, its name, and how its bytes are found.

Locators are plain data, so that another machine can read what this one listed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Protocol

IMAGES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif",
)  # fmt: skip
"""File names taken for images in folders and tar files; those that can't be decoded become rows that say so."""


@dataclass(frozen=True)
class FileAt:
    """A whole file: a local path or an fsspec URL (s3://bucket/key)."""

    url: str


@dataclass(frozen=True)
class FileRange:
    """A range of bytes of a file, such as a member of a tar."""

    url: str
    offset: int
    size: int


@dataclass(frozen=True)
class WebUrl:
    """An http or https URL, fetched through the one door."""

    url: str


@dataclass(frozen=True)
class Inline:
    """The bytes themselves, from a table or a compressed tar."""

    data: bytes


@dataclass(frozen=True)
class Unusable:
    """An entry of a list or table that names no image; `message` says why."""

    message: str


Locator = FileAt | FileRange | WebUrl | Inline | Unusable


@dataclass(frozen=True)
class Item:
    """`index` counts the source's entries from 0, in an order that is the same each time it is listed."""

    index: int
    name: str
    locator: Locator


@dataclass(frozen=True)
class Extent:
    """What a listing amounts to: `digest` changes with the source; `count` is None where counting would mean reading
    it all."""

    digest: str
    count: int | None


class Source(Protocol):
    """A stable, ordered list of images. Both methods block."""

    @property
    def description(self) -> str:
        """The source in words, for messages and the manifest."""
        ...

    def extent(self) -> Extent:
        """Look at all entries, without reading an image. Raises INVALID_ARGUMENT or NOT_FOUND."""
        ...

    def entries(self) -> Iterator[tuple[str, Locator]]:
        """Name and place of each image, in order."""
        ...


def items(source: Source) -> Iterator[Item]:
    """The entries of a source, numbered."""
    for index, (name, locator) in enumerate(source.entries()):
        yield Item(index, name, locator)


def is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGES
