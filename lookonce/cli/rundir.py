"""The data directory of one running system: its lock, and run/up.json, by which other commands find it.

DATA_DIR/store      the embedded store (unless --store says otherwise)
DATA_DIR/gateway    files and batches
DATA_DIR/log        one log file per service
DATA_DIR/run        lock, up.json and the services' unix sockets; no meaning once `lookonce up` has ended
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from lookonce.core.errors import ErrorKind, LookonceError, invalid

MAX_SOCKET_PATH_BYTES = 100
"""The kernel's limit is 107 bytes on Linux and 103 on macOS."""
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_./-]+")


def default_data_dir() -> Path:
    """$XDG_DATA_HOME/lookonce, by default ~/.local/share/lookonce."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "lookonce"


@dataclass(frozen=True)
class RunningSystem:
    """What up.json says of a system that runs now."""

    pid: int
    url: str
    model: str
    ready: bool
    services: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> {"address", "metrics", "pid", "state"}


class DataDirectory:
    """Owns DATA_DIR for as long as the lock is held. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().absolute()
        self.run = self.path / "run"
        self.store = self.path / "store"
        self.log = self.path / "log"
        self._lock: int | None = None

    def __enter__(self) -> DataDirectory:
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            for directory in (self.run, self.store, self.log):
                directory.mkdir(mode=0o700, exist_ok=True)
                directory.chmod(0o700)
        except OSError as error:
            raise invalid(
                f"--data-dir={self.path}: cannot be used ({error.strerror}); choose a directory you may write to",
                param="data_dir",
            ) from None
        self._lock = _lock(self.run / "lock")
        if self._lock is None:
            holder = read_up_file(self.path)
            who = f" (process {holder.pid}, {holder.url})" if holder else ""
            raise LookonceError(
                ErrorKind.CONFLICT,
                f"another `lookonce up`{who} is running on {self.path}; stop it, or give this one its own --data-dir",
                param="data_dir",
            )
        for stale in (*self.run.glob("*.sock"), self.run / "up.json"):
            stale.unlink(missing_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        (self.run / "up.json").unlink(missing_ok=True)
        for socket in self.run.glob("*.sock"):
            socket.unlink(missing_ok=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def socket_address(self, name: str) -> str | None:
        """unix:DATA_DIR/run/NAME.sock, or None when the path is too long or too odd for a socket address."""
        path = str(self.run / f"{name}.sock")
        if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES or not _PLAIN_PATH.fullmatch(path):
            return None
        return f"unix:{path}"

    def write_up_file(self, system: RunningSystem) -> None:
        """Publish the system's state, whole or not at all."""
        handle, temporary = tempfile.mkstemp(dir=self.run, prefix=".up-")  # 0600
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(vars(system), stream, indent=2)
        os.replace(temporary, self.run / "up.json")


def find_running(data_dir: Path) -> RunningSystem | None:
    """The system that runs on a data directory now, or None. A stale file of a killed one doesn't count."""
    run = data_dir.expanduser().absolute() / "run"
    if not (run / "lock").is_file():
        return None
    try:
        handle = _lock(run / "lock", shared=True)
    except LookonceError:
        return None  # somebody else's directory
    if handle is not None:
        os.close(handle)
        return None
    return read_up_file(data_dir)


def read_up_file(data_dir: Path) -> RunningSystem | None:
    """What up.json says, whether or not the system still runs; None when there is no such file."""
    try:
        return RunningSystem(**json.loads((data_dir.expanduser() / "run" / "up.json").read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _lock(path: Path, *, shared: bool = False) -> int | None:
    """A descriptor that holds the lock until closed (or until this process ends), or None when another holds it."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise invalid(f"{path} cannot be opened ({error.strerror})", param="data_dir") from None
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle
