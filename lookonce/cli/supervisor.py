"""Runs processes as one system: all up or a clear failure, drained in order at the end.

Each is started, followed by its health, started again when it ends, and ended with grace. The order of `services` is
the order in which they are drained: those that send requests before those that answer them.

Knows nothing of models: a service is a command line, an address to probe and a place for logs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lookonce.cli.child import command
from lookonce.cli.health import Health, Probe
from lookonce.cli.service_log import OutputLog
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.process import PERMANENT_EXIT, USAGE_EXIT
from lookonce.core.tasks import start_task

MISSES = 3
"""Probes in a row that fail before a ready service counts as unready: a busy one may miss one."""


@dataclass(frozen=True)
class RestartPolicy:
    """When a service that ended is started again."""

    first_delay: float = 0.5  # seconds; doubles with each failure in a row
    max_delay: float = 30.0
    healthy_after: float = 30.0  # seconds of being ready that forget earlier failures
    start_attempts: int = 3  # failures in a row before it was ever ready, after which the start has failed

    def delay(self, failures: int) -> float:
        """Seconds to wait after the given number of failures in a row (>= 1)."""
        return float(min(self.first_delay * 2 ** (failures - 1), self.max_delay))


@dataclass(frozen=True)
class ServicePlan:
    """What to run and where it answers."""

    name: str  # "vision" | "language" | "gateway"
    module: str
    arguments: list[str]
    environment: Mapping[str, str]
    address: str  # what other processes reach it by
    make_probe: Callable[[], Probe]
    metrics: str | None = None  # host:port or unix:/path that answers Prometheus
    python: str = sys.executable  # of the environment it runs in


class ServiceFailed(LookonceError):
    """A service that couldn't be started; `lines` are its last ones of output, where its own words don't explain it."""

    def __init__(self, name: str, explanation: str, lines: list[str]) -> None:
        super().__init__(ErrorKind.UNAVAILABLE, f"the {name} service can't start: {explanation}")
        self.lines = lines


class Service:
    """Keeps one process running.

    `changed(name, text)` is called at each change of state, `show(name, line)` for each log line worth showing.
    """

    def __init__(
        self,
        plan: ServicePlan,
        log_file: Path,
        changed: Callable[[str, str], None],
        show: Callable[[str, str], None],
        *,
        policy: RestartPolicy | None = None,
        show_logs: bool = False,
    ) -> None:
        self.plan = plan
        self.state = "stopped"
        self.pid: int | None = None
        self.ready = asyncio.Event()
        self._policy = policy or RestartPolicy()
        self._log_file = log_file
        self._log = OutputLog(log_file)
        self._show_logs = show_logs
        self._changed = changed
        self._show = show
        self._stopping = False
        self._ready_since: float | None = None
        self._ever_ready = False
        self._misses = 0

    async def keep_running(self) -> None:
        """Run and restart until `stop`. Raises ServiceFailed when it can't be started at all."""
        failures = 0
        while not self._stopping:
            self._ready_since = None
            code = await self._run_once()
            if self._stopping:
                break
            healthy = time.monotonic() - self._ready_since if self._ready_since is not None else 0.0
            failures = 1 if healthy >= self._policy.healthy_after else failures + 1
            ending = describe_exit(code)
            permanent = code in (PERMANENT_EXIT, USAGE_EXIT)
            if not self._ever_ready and (permanent or failures >= self._policy.start_attempts):
                self._change("failed", ending)
                raise self._failure(ending, permanent)
            delay = self._policy.delay(failures)
            self._change("restarting", f"{ending}; restarting in {delay:g} s")
            for line in self._log.last(3) if not self._ever_ready else []:
                self._show(self.plan.name, f"  {line}")
            await asyncio.sleep(delay)

    def _failure(self, ending: str, permanent: bool) -> ServiceFailed:
        lines = self._log.last()
        words = spoken(lines[-1], self.plan.name) if lines else ""
        if permanent and words:
            return ServiceFailed(self.plan.name, words, [])
        return ServiceFailed(self.plan.name, f"{ending}{words and ': '}{words} (its log: {self._log_file})", lines[:-1])

    async def stop(self, grace: float) -> None:
        """SIGTERM, then SIGKILL after `grace` seconds (0: at once, as was asked). Returns once the process is gone."""
        self._stopping = True
        if self.pid is None:
            return
        self._change("stopping", "draining")
        self.send(signal.SIGTERM, group=False)
        deadline = time.monotonic() + grace
        while self.pid is not None:
            if time.monotonic() >= deadline:
                if grace > 0:
                    self._change("stopping", f"did not end within {grace:g} s; killing it")
                self.send(signal.SIGKILL)
                deadline = float("inf")
            await asyncio.sleep(0.02)
        self._change("stopped", "stopped")

    def send(self, number: int, *, group: bool = True) -> None:
        """Signal the process, with whatever it started (`group`)."""
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number) if group else os.kill(self.pid, number)

    def close(self) -> None:
        self._log.close()

    async def _run_once(self) -> int:
        """One life of the process, from start to exit status (negative: the signal that ended it)."""
        loop = asyncio.get_running_loop()
        self._log.tail.clear()
        read_end, write_end = os.pipe()  # our own: asyncio's would delay wait() while a grandchild holds the other end
        try:
            process = await asyncio.create_subprocess_exec(
                *command(self.plan.module, self.plan.arguments, python=self.plan.python),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=write_end,
                stderr=write_end,
                env=dict(self.plan.environment),
                start_new_session=True,  # Ctrl-C in the terminal is for the supervisor alone
            )
        except BaseException:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        os.set_blocking(read_end, False)
        loop.add_reader(read_end, self._read, read_end)
        self.pid = process.pid
        self._change("starting", f"starting (process {process.pid})")
        watcher = start_task(self._follow_health())
        try:
            code = await process.wait()
        finally:
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher
            self.send(signal.SIGKILL)  # whatever it started and left behind
            self.pid = None
            self.ready.clear()
            self._read(read_end)
            loop.remove_reader(read_end)
            os.close(read_end)
        return code

    async def _follow_health(self) -> None:
        probe = self.plan.make_probe()
        try:
            while True:
                health = await probe.check()
                if not self._stopping:
                    self._note_health(health)
                await asyncio.sleep(1.0 if self.ready.is_set() else 0.1)
        finally:
            await probe.close()

    def _note_health(self, health: Health) -> None:
        self._misses = 0 if health is Health.READY else self._misses + 1
        if health is Health.READY and not self.ready.is_set():
            self._ever_ready = True
            if self._ready_since is None:
                self._ready_since = time.monotonic()
            self.ready.set()
            self._change("ready", "ready")
        elif health is Health.LOADING and self.state == "starting":
            self._change("loading", "loading")
        elif self._misses >= MISSES and self.ready.is_set():
            self.ready.clear()
            self._change("unready", "not answering" if health is Health.SILENT else "not ready")

    def _read(self, handle: int) -> None:
        """Take what the process has written so far."""
        while True:
            try:
                data = os.read(handle, 1 << 16)
            except BlockingIOError:
                return
            if not data:
                asyncio.get_running_loop().remove_reader(handle)
                return
            for line in self._log.feed(data, self._least_shown()):
                self._show(self.plan.name, line)

    def _least_shown(self) -> str:
        # Services that start together can't reach each other at first: warnings count once they could.
        return "debug" if self._show_logs else "warning" if self._ever_ready else "error"

    def _change(self, state: str, text: str) -> None:
        self.state = state
        self._changed(self.plan.name, text)


def spoken(line: str, service: str) -> str:
    """A process's last line without what a command line puts before its errors."""
    for before in (f"{service}: ", "error: ", "Error: ", "Invalid value: "):
        line = line.removeprefix(before)
    return line


def describe_exit(code: int) -> str:
    """An exit status in words: "exited with status 3", "killed by SIGKILL"."""
    if code >= 0:
        return f"exited with status {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


FORCED_EXIT = 130
_KILL_MARGIN = 3.0  # seconds beyond its own grace that a service gets before SIGKILL
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Supervisor:
    """`on_ready` is called once, when every service is ready for the first time."""

    def __init__(self, services: Sequence[Service], *, grace: float, on_ready: Callable[[], None]) -> None:
        self.services = services
        self.grace = grace
        self._on_ready = on_ready
        self._stop = asyncio.Event()
        self._forced = False

    async def run(self) -> int:
        """Supervise until a signal; the process's exit status. Raises ServiceFailed when a service can't be started."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._signalled)
        keepers: set[asyncio.Task[Any]] = {start_task(service.keep_running()) for service in self.services}
        others: set[asyncio.Task[Any]] = {start_task(self._announce()), start_task(self._stop.wait())}
        try:
            await self._until_over(keepers, others)
        finally:
            await self._shut_down(keepers | others)
            for number in _SIGNALS:
                loop.remove_signal_handler(number)
        return FORCED_EXIT if self._forced else 0

    async def _until_over(self, keepers: set[asyncio.Task[Any]], others: set[asyncio.Task[Any]]) -> None:
        pending: set[asyncio.Task[Any]] = {*keepers, *others}
        while pending and not self._stop.is_set():
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # raises ServiceFailed

    async def _announce(self) -> None:
        for service in self.services:
            await service.ready.wait()
        self._on_ready()

    async def _shut_down(self, tasks: set[asyncio.Task[Any]]) -> None:
        for service in self.services:
            await service.stop(0.0 if self._forced else self.grace + _KILL_MARGIN)
        for task in tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, ServiceFailed):
                await task
        for service in self.services:
            service.close()

    def _signalled(self) -> None:
        if self._stop.is_set():
            self._forced = True
            for service in self.services:
                service.send(signal.SIGKILL)
        self._stop.set()
