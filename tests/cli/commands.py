"""Runs `python -m lookonce` for tests: to its end, or in the background with its output followed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
from typer.testing import CliRunner

from lookonce.cli.rundir import RunningSystem, read_up_file
from lookonce.cli.typer_app import app
from tests.processes import ROOT

START_SECONDS = 180.0


def environment(**extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LOOKONCE_")}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200", **extra}


def lookonce(
    *arguments: str, stdin: str | None = None, seconds: float = 240, **env: str
) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "lookonce", *map(str, arguments)]
    given = {"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}
    return subprocess.run(
        command, cwd=ROOT, env=environment(**env), capture_output=True, text=True, timeout=seconds, check=False, **given
    )


def invoke(*arguments: object, **env: str) -> SimpleNamespace:
    """The same, in this process: for what ends before anything is started."""
    cleared: dict[str, str | None] = {name: None for name in os.environ if name.startswith("LOOKONCE_")}
    done = CliRunner().invoke(app, list(map(str, arguments)), env={**cleared, "COLUMNS": "200", **env})
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return SimpleNamespace(returncode=done.exit_code, stdout=done.stdout, stderr=done.stderr)


class Background:
    """A command that goes on running; as a context manager it is killed at the end, if it still runs."""

    def __init__(self, *command: str, **env: str) -> None:
        self._output = tempfile.NamedTemporaryFile(prefix="lookonce-test-", suffix=".log")  # noqa: SIM115
        self.process = subprocess.Popen(
            list(map(str, command)), cwd=ROOT, env=environment(**env), stdin=subprocess.DEVNULL,
            stdout=self._output, stderr=self._output, start_new_session=True,
        )  # fmt: skip

    @property
    def output(self) -> str:
        return Path(self._output.name).read_text(errors="replace")

    def wait_for(self, pattern: str, *, times: int = 1, seconds: float = START_SECONDS) -> str:
        """The output, once `pattern` is in it `times` times."""
        return until(
            lambda: self.output if len(re.findall(pattern, self.output)) >= times else None,
            seconds,
            lambda: f"{pattern!r} not seen {times} times in:\n{self.output}",
        )

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait_exit(self, seconds: float = START_SECONDS) -> int:
        return self.process.wait(seconds)

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._output.close()


class Up(Background):
    """`lookonce up` on a data directory, with its gateway on a free port."""

    def __init__(self, data_dir: Path, *arguments: str, **env: str) -> None:
        self.data_dir = data_dir
        command = [sys.executable, "-m", "lookonce", "up", "--data-dir", str(data_dir)]
        super().__init__(*command, *arguments, **env)

    @property
    def system(self) -> RunningSystem:
        found = read_up_file(self.data_dir)
        assert found is not None, self.output
        return found

    def pids(self) -> dict[str, int | None]:
        return {name: service["pid"] for name, service in self.system.services.items()}


def until(look, seconds: float, explain):
    """What `look` answers, once it answers something."""
    deadline = time.monotonic() + seconds
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < deadline, explain()
        time.sleep(0.05)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
