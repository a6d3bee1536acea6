"""Rows in files in memory: written once by the scheduler's process, mapped by every worker.

A file is complete before it has its name, and is not removed while somebody has pinned it. So a worker that is told of
a slot can't miss it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import shutil
import tempfile
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import torch

_PREFIX, _LOCK = "lookonce-vllm-", "lock"


@dataclass(frozen=True)
class Slot:
    """Where an image's rows are: [tokens, width] of `dtype`, row-major from the file's start."""

    path: str
    tokens: int
    width: int
    dtype: torch.dtype
    grid_thw: tuple[int, int, int]  # as the record tells it

    @property
    def nbytes(self) -> int:
        """Of the file."""
        return self.tokens * self.width * self.dtype.itemsize

    def rows(self) -> torch.Tensor:
        """A tensor on the CPU over the mapped file. Not to be written to."""
        with open(self.path, "r+b") as file:
            mapped = mmap.mmap(file.fileno(), self.nbytes, access=mmap.ACCESS_COPY)
        return torch.frombuffer(mapped, dtype=self.dtype).view(self.tokens, self.width)


@dataclass
class _Entry:
    slot: Slot
    users: set[str] = field(default_factory=set)


class Shelf:
    """Slots by embedding key, the least recently used out first. Used by one thread."""

    def __init__(self, parent: Path, max_bytes: int) -> None:
        """Makes a directory of its own, which only this user can read, and removes those of processes that are gone.
        Raises OSError."""
        self.max_bytes = max_bytes
        self.bytes = 0
        for left in parent.glob(f"{_PREFIX}*"):
            _remove_abandoned(left)
        self._directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        self._lock = (self._directory / _LOCK).open("wb")
        fcntl.flock(self._lock, fcntl.LOCK_EX)  # held as long as the process lives
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
        self.bytes += slot.nbytes
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
            self.bytes -= entry.slot.nbytes
            Path(entry.slot.path).unlink(missing_ok=True)

    def write(self, rows: torch.Tensor, grid_thw: tuple[int, int, int]) -> Slot:
        """Rows [tokens, width] into a new file, in any thread. Raises OSError where there is no room."""
        handle, path = tempfile.mkstemp(dir=self._directory)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(rows.contiguous().view(torch.uint8).numpy().data)
        except OSError:
            Path(path).unlink(missing_ok=True)
            raise
        return Slot(path, rows.shape[0], rows.shape[1], rows.dtype, grid_thw)

    def close(self) -> None:
        """Remove everything."""
        self._entries.clear()
        self._lock.close()
        shutil.rmtree(self._directory, ignore_errors=True)


def _remove_abandoned(directory: Path) -> None:
    """vLLM ends its processes without a word, and files in memory outlive them."""
    try:
        with (directory / _LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory)
    except OSError:  # in use, another user's, or just being made
        return
