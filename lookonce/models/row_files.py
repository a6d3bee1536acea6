"""Embedding rows in files in memory, which other processes map: how rows reach workers of an engine that computes in
processes of its own.

A file is complete before its name is told to anybody. A directory belongs to one process; that of a process which has
ended without a word is removed by the next one.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

SHARED_MEMORY = Path("/dev/shm")
_LOCK = "lock"


@dataclass(frozen=True)
class RowFile:
    """Where an image's rows are: [tokens, width] of `dtype`, row-major from the file's start."""

    path: str
    tokens: int
    width: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Of the file."""
        return self.tokens * self.width * self.dtype.itemsize

    def rows(self) -> torch.Tensor:
        """A tensor on the CPU over the mapped file; what is written to it stays in this process. Raises OSError."""
        with open(self.path, "r+b") as file:
            mapped = mmap.mmap(file.fileno(), self.nbytes, access=mmap.ACCESS_COPY)
        return torch.frombuffer(mapped, dtype=self.dtype).view(self.tokens, self.width)

    def remove(self) -> None:
        """Whoever has mapped it keeps what it has mapped."""
        Path(self.path).unlink(missing_ok=True)


class RowDirectory:
    """A directory of row files, which only this user can read."""

    def __init__(self, parent: Path, prefix: str) -> None:
        """Makes it, and removes those with this prefix whose processes are gone. Raises OSError."""
        for left in parent.glob(f"{prefix}*"):
            _remove_abandoned(left)
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        self._lock = (self.path / _LOCK).open("wb")
        fcntl.flock(self._lock, fcntl.LOCK_EX)  # held as long as the process lives

    def write(self, rows: torch.Tensor) -> RowFile:
        """Rows [tokens, width] into a new file, in any thread. Raises OSError where there is no room."""
        handle, path = tempfile.mkstemp(dir=self.path)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(rows.contiguous().view(torch.uint8).numpy().data)
        except OSError:
            Path(path).unlink(missing_ok=True)
            raise
        return RowFile(path, rows.shape[0], rows.shape[1], rows.dtype)

    def close(self) -> None:
        """Remove everything."""
        self._lock.close()
        shutil.rmtree(self.path, ignore_errors=True)


def _remove_abandoned(directory: Path) -> None:
    try:
        with (directory / _LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory)
    except OSError:  # in use, another user's, or just being made
        return
