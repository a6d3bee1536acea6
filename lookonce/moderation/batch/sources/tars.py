"""Tar files in the manner of webdataset: the images among the members; .json, .txt and the like are passed over.

Members of a plain tar are read where they lie, in any order; a compressed one is read from front to end.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator

from blake3 import blake3

from lookonce.core.errors import ErrorKind, LookonceError, invalid
from lookonce.moderation.batch.sources.filesystems import open_file, scheme_of, stat, translated
from lookonce.moderation.batch.sources.items import Extent, FileRange, Inline, Locator, is_image


class Tar:
    """The images of one tar file; a name is TAR#MEMBER."""

    def __init__(self, name: str, *, max_bytes: int) -> None:
        self.description = name
        self._max_bytes = max_bytes
        self._plain = name.lower().endswith(".tar")

    def extent(self) -> Extent:
        """Digest of size and time of change; counted where that takes no more than seeking."""
        entry = stat(self.description)
        digest = blake3(f"{entry.size}\0{entry.changed}".encode()).hexdigest()
        cheap = self._plain and not scheme_of(self.description)
        return Extent(digest, sum(1 for _ in self._members()) if cheap else None)

    def entries(self) -> Iterator[tuple[str, Locator]]:
        """One for each image among the members."""
        for archive, member in self._members():
            name = f"{self.description}#{member.name}"
            if self._plain:
                yield name, FileRange(self.description, member.offset_data, member.size)
                continue
            with translated(self.description):
                file = archive.extractfile(member)
                yield name, Inline(file.read(self._max_bytes + 1) if file is not None else b"")

    def _members(self) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
        try:
            with (
                open_file(self.description) as file,
                tarfile.open(fileobj=file, mode="r:" if self._plain else "r|*") as archive,
            ):
                for member in archive:
                    if member.isfile() and not member.issparse() and is_image(member.name):
                        yield archive, member
                    archive.members = []  # type: ignore[attr-defined]  # it would remember all of them
        except tarfile.TarError as error:
            raise invalid(f"{self.description} is no tar file, or is damaged", param="source") from error
        except (EOFError, OSError) as error:
            text = f"{self.description} ends early or cannot be read"
            raise LookonceError(ErrorKind.UNAVAILABLE, text, param="source") from error
