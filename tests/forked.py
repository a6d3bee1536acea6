"""Model services forked from a process that has imported torch and other libraries, and nothing of ours. The import of
torch is two thirds of the work of a start.

A service is still a process of its own, with the arguments, environment, log and end of a command. Where the start is
itself tested (tests/cli), and wherever a process has an environment of its own, it begins with nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from multiprocessing import forkserver
from pathlib import Path
from threading import Lock

MODULES = ("vision_service", "lm_service")
"""What can be forked."""
READ_BY_IMPORTS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.forked_libraries"])


class ForkedProcess:
    """`python -m module *arguments` in `folder`, with what we use of subprocess.Popen."""

    def __init__(self, module: str, arguments: list[str], environment: dict[str, str], folder: Path, log: Path) -> None:
        _start_server()
        self.args = (module, *arguments)
        target_args = (module, arguments, environment, str(folder), str(log))
        self._process = _FORKS.Process(target=_run, args=target_args, daemon=True)
        self._lock = Lock()  # its status can be read once
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        with self._lock:
            return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        with self._lock:
            self._process.join(timeout)
            status = self._process.exitcode
        if status is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _start_server() -> None:
    """The process that is forked from, if it does not run yet."""
    before = {name: os.environ.get(name) for name in READ_BY_IMPORTS}
    os.environ.update(READ_BY_IMPORTS)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _run(module: str, arguments: list[str], environment: dict[str, str], folder: str, log: str) -> None:
    """In the new process: what `python -m` does."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    with open(log, "ab") as output, open(os.devnull, "rb") as nothing:
        for source, target in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(source.fileno(), target)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
