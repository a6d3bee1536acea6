"""Real processes for tests: started, waited for, terminated or killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.forked import MODULES, READ_BY_IMPORTS, ForkedProcess

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 180.0


class Process:
    """`python -m module *args` with a log of its own, as a context manager; a subclass says when it is `ready`. A model
    service without an environment or a prefix of its own is forked (tests.forked)."""

    def __init__(
        self,
        module: str,
        *args: str,
        env: dict[str, str] | None = None,
        prefix: tuple[str, ...] = (),  # what the command is run by, such as `ip netns exec`
        python: str = sys.executable,  # of another environment
    ) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="lookonce-test-", ignore_cleanup_errors=True)
        self.log_path = Path(self._directory.name) / "log"
        self.module = module
        self._args = list(args)
        self._prefix, self._python = prefix, python
        self._env = {**os.environ, **(env or {})}
        self._forked = module in MODULES and not prefix and not env and python == sys.executable

    def _spawn(self) -> subprocess.Popen[bytes] | ForkedProcess:
        if self._forked:
            return ForkedProcess(self.module, self._args, self._env, ROOT, self.log_path)
        command = [*self._prefix, self._python, "-m", self.module, *self._args]
        with self.log_path.open("ab") as log:
            return subprocess.Popen(command, cwd=ROOT, env=self._env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    @property
    def log(self) -> str:
        """All the process has written to stdout and stderr so far."""
        return self.log_path.read_text(errors="replace")

    @property
    def pid(self) -> int:
        """Of the process now running."""
        return self.process.pid

    def ready(self) -> bool:
        """Whether it serves right now."""
        raise NotImplementedError

    def wait_ready(self, seconds: float = START_SECONDS) -> Self:
        """Return once it is ready; AssertionError with the log when the process ends or time runs out."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"{self.module} exited with {self.process.returncode}:\n{self.log}")
            if self.ready():
                return self
            time.sleep(0.05)
        self.kill()
        raise AssertionError(f"{self.module} was not ready after {seconds} s:\n{self.log}")

    def wait_exit(self, seconds: float = START_SECONDS) -> int:
        """The exit status; subprocess.TimeoutExpired when it goes on running."""
        return self.process.wait(seconds)

    def terminate(self, seconds: float = START_SECONDS) -> int:
        """SIGTERM, and the exit status."""
        self.process.terminate()
        return self.wait_exit(seconds)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Stopped (SIGSTOP) while the body runs: whatever it is doing is not done before."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, as a crash would be."""
        self.process.kill()
        self.process.wait()

    def restart(self) -> Self:
        """Start it again at the same address, after `kill` or `terminate`; returns when ready."""
        if self.process.poll() is None:
            self.kill()
        self.process = self._spawn()
        return self.wait_ready()

    def close(self) -> None:
        """Kill if still running, and remove its files."""
        if self.process.poll() is None:
            self.kill()
        self._directory.cleanup()

    def __enter__(self) -> Self:
        try:
            return self.wait_ready()
        except BaseException:
            self.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ServiceProcess(Process):
    """A model service listening on its own unix socket (or on `listen`); ready when gRPC health says SERVING.

    >>> with ServiceProcess("vision_service", "--model", str(path)) as vision:
    ...     channel = grpc.insecure_channel(vision.address)
    """

    def __init__(self, module: str, *args: str, listen: str | None = None, **how: Any) -> None:
        super().__init__(module, **how)
        self.address = listen or f"unix:{self._directory.name}/{module}.sock"
        self._args = ["--listen", self.address, *args]
        self._env = {**self._env, **READ_BY_IMPORTS, **(how.get("env") or {})}
        self.process = self._spawn()

    def healthy(self) -> bool:
        """Whether gRPC health says SERVING right now."""
        options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(self.address, options=options) as channel:
            try:
                reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
            except grpc.RpcError:
                return False
        return reply.status == health_pb2.HealthCheckResponse.SERVING

    ready = healthy
