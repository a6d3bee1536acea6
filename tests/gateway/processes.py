"""A real gateway process over real services, for tests."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx2

from tests.processes import START_SECONDS

ROOT = Path(__file__).resolve().parents[2]
MODEL = "tiny-vl"


class GatewayProcess:
    """`python -m gateway` on a free port, as a context manager; `url` is where it listens."""

    def __init__(self, *args: str, env: dict[str, str] | None = None) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="lookonce-gateway-")
        self.log_path = Path(self._directory.name) / "log"
        command = [sys.executable, "-m", "gateway", "--port", "0", "--log-format", "json", "--model-name", MODEL, *args]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **(env or {})}, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.url = ""

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def lines(self, event: str) -> list[dict[str, Any]]:
        """Log lines of one kind."""
        whole, _, _ = self.log.rpartition("\n")  # the last line may be half written
        parsed = [json.loads(line) for line in whole.splitlines() if line.startswith("{") and line.endswith("}")]
        return [line for line in parsed if line.get("event") == event]

    def line(self, event: str, seconds: float = START_SECONDS, **fields: Any) -> dict[str, Any]:
        """The newest log line of one kind with these fields; waits, as it is written after the answer."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for line in reversed(self.lines(event)):
                if fields.items() <= line.items():
                    return line
            time.sleep(0.02)
        raise AssertionError(f"no {event} line with {fields}:\n{self.log}")

    def wait_listening(self, seconds: float = START_SECONDS) -> GatewayProcess:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the gateway exited with {self.process.returncode}:\n{self.log}")
            found = re.search(r'"url": "(http[^"]+)"', self.log)
            if found is not None and _alive(found[1]):
                self.url = found[1]
                return self
            time.sleep(0.05)
        raise AssertionError(f"the gateway does not listen:\n{self.log}")

    def terminate(self, seconds: float = START_SECONDS) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def client(self, key: str | None = None, **options: Any) -> httpx2.Client:
        """One that loads no certificates, which takes 20 ms: all is plain HTTP here."""
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=180, trust_env=False, verify=False, **options)

    def __enter__(self) -> GatewayProcess:
        try:
            return self.wait_listening()
        except BaseException:
            self.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._directory.cleanup()


def _alive(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/healthz", timeout=10, trust_env=False, verify=False).status_code == 200
    except httpx2.TransportError:
        return False
