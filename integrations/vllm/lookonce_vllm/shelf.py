"""Rows in files in memory: written once by the scheduler's process, mapped by every worker.

A file is not removed while somebody has pinned it. So a worker that is told of a slot can't miss it.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lookonce.models.row_files import RowDirectory, RowFile

_PREFIX = "lookonce-vllm-"


@dataclass(frozen=True)
class Slot:
    """Where an image's rows are, and its grid as the record tells it."""

    file: RowFile
    grid_thw: tuple[int, int, int]

    @property
    def tokens(self) -> int:
        """How many rows."""
        return self.file.tokens


@dataclass
class _Entry:
    slot: Slot
    users: set[str] = field(default_factory=set)


class Shelf:
    """Slots by embedding key, the least recently used out first. Used by one thread."""

    def __init__(self, parent: Path, max_bytes: int) -> None:
        """See `RowDirectory`. Raises OSError."""
        self.max_bytes = max_bytes
        self.bytes = 0
        self._directory = RowDirectory(parent, _PREFIX)
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def get(self, key: str) -> Slot | None:
        """The slot, which counts as a use."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key].slot

    def put(self, key: str, slot: Slot) -> None:
        """Keep a slot that `write` made; others that nobody has pinned make room for it."""
        self.discard(key)
        self._entries[key] = _Entry(slot)
        self.bytes += slot.file.nbytes
        for old in [name for name, entry in self._entries.items() if not entry.users and name != key]:
            if self.bytes <= self.max_bytes:
                return
            self.discard(old)

    def pin(self, key: str, user: str) -> None:
        """`user` reads the slot until it is unpinned."""
        self._entries[key].users.add(user)

    def unpin(self, key: str, user: str) -> None:
        """`user` has read it. Nothing happens where it was not pinned."""
        if key in self._entries:
            self._entries[key].users.discard(user)

    def unpin_all(self, user: str) -> None:
        """`user` has ended."""
        for entry in self._entries.values():
            entry.users.discard(user)

    def discard(self, key: str) -> None:
        """Remove a slot; a mapping that a worker has stays valid."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.bytes -= entry.slot.file.nbytes
            entry.slot.file.remove()

    def write(self, rows: torch.Tensor, grid_thw: tuple[int, int, int]) -> Slot:
        """Rows [tokens, width] into a new file, in any thread. Raises OSError where there is no room."""
        return Slot(self._directory.write(rows), grid_thw)

    def close(self) -> None:
        """Remove everything."""
        self._entries.clear()
        self._directory.close()
