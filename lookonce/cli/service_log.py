"""A service's output: kept in a file, its last lines in memory, its warnings shown. Lines are JSON or plain."""

from __future__ import annotations

import contextlib
import json
import os
from collections import deque
from pathlib import Path
from typing import IO

KEPT_LINES = 40
MAX_LINE_BYTES = 1 << 16
MAX_FILE_BYTES = 16 << 20
_SEVERITY = {"debug": 0, "info": 1, "warning": 2, "error": 3, "critical": 4}
_HIDDEN_FIELDS = {"event", "level", "timestamp", "service", "logger", "exception"}


class OutputLog:
    """Takes raw output in pieces and tells which lines are worth a person's attention."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tail: deque[str] = deque(maxlen=KEPT_LINES)
        self._partial = b""
        self._file = self._open()

    def feed(self, data: bytes, least: str) -> list[str]:
        """Take a piece of output; the readable form of each whole line of severity `least` or above."""
        self._write(data)
        *whole, self._partial = (self._partial + data).split(b"\n")
        if len(self._partial) > MAX_LINE_BYTES:
            whole, self._partial = [*whole, self._partial], b""
        return [text for line in whole if line.strip() and (text := self._take(line, least)) is not None]

    def close(self) -> None:
        self._file.close()

    def last(self, lines: int = 8) -> list[str]:
        """The last lines, oldest first: what a failed start has to say for itself."""
        if self._partial.strip():
            self._take(self._partial, "error")
            self._partial = b""
        return list(self.tail)[-lines:]

    def _take(self, line: bytes, least: str) -> str | None:
        text, level = readable(line.decode("utf-8", "replace").rstrip())
        self.tail.append(text)
        return text if _SEVERITY.get(level, 2) >= _SEVERITY[least] else None

    def _write(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # a full disk costs log lines, not the service
            self._append(data)

    def _append(self, data: bytes) -> None:
        if self._file.tell() > MAX_FILE_BYTES:
            self._file.close()
            os.replace(self.path, self.path.with_suffix(".log.1"))
            self._file = self._open()
        self._file.write(data)

    def _open(self) -> IO[bytes]:
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        return os.fdopen(handle, "ab", buffering=0)


def readable(line: str) -> tuple[str, str]:
    """The line for people, and its severity. Plain (unstructured) lines are "debug": they are in the file."""
    try:
        record = json.loads(line) if line.startswith("{") else None
    except ValueError:
        record = None
    if not isinstance(record, dict) or "event" not in record:
        return line, "debug"
    level = str(record.get("level", "info"))
    fields = " ".join(f"{name}={value}" for name, value in record.items() if name not in _HIDDEN_FIELDS)
    text = f"{level}: {record['event']}" + (f" ({fields})" if fields else "")
    if "exception" in record:
        text += ": " + str(record["exception"]).strip().rpartition("\n")[2]
    return text, level
