"""A system for a command to use: the one at a URL, the one on a data directory, or one started for the call."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from lookonce.cli.child import command
from lookonce.cli.rundir import RunningSystem, find_running, read_up_file
from lookonce.core.errors import ErrorKind, LookonceError

_POLL_SECONDS = 0.05


@contextmanager
def some_system(url: str | None, data_dir: Path, up_arguments: list[str]) -> Iterator[str]:
    """The URL of a gateway that can be asked while the block runs."""
    if url is not None:
        yield url
        return
    running = find_running(data_dir)
    if running is not None:
        yield _wait_ready(running, data_dir).url
        return
    with started(data_dir, ["--port", "0", *up_arguments]) as system:
        yield system.url


@contextmanager
def started(data_dir: Path, up_arguments: list[str]) -> Iterator[RunningSystem]:
    """`lookonce up` as a child, ready; drained at the end, and also when this process is killed."""
    arguments = ["up", "--data-dir", str(data_dir), *up_arguments]
    process = subprocess.Popen(
        command("lookonce", arguments, signal_number=signal.SIGTERM),
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr.fileno(),  # stdout is for the answers
        start_new_session=True,
    )
    try:
        yield _wait_started(process, data_dir)
    finally:
        process.terminate()
        process.wait()


def _wait_started(process: subprocess.Popen[bytes], data_dir: Path) -> RunningSystem:
    while True:
        if process.poll() is not None:
            raise typer.Exit(process.returncode or 1)  # its last line said why
        system = read_up_file(data_dir)
        if system is not None and system.ready and system.pid == process.pid:
            return system
        time.sleep(_POLL_SECONDS)


def _wait_ready(system: RunningSystem, data_dir: Path) -> RunningSystem:
    while not system.ready:
        time.sleep(_POLL_SECONDS)
        found = find_running(data_dir)
        if found is None:
            raise LookonceError(ErrorKind.UNAVAILABLE, f"the system on {data_dir} ended before it was ready")
        system = found
    return system
