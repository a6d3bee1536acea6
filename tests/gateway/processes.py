"""A real gateway process over real services, for tests."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import httpx2

from tests.processes import START_SECONDS, Process

MODEL = "tiny-vl"


class GatewayProcess(Process):
    """`python -m gateway` on a port that it chooses; `url` is where it listens, once it is ready."""

    def __init__(self, *args: str, env: dict[str, str] | None = None) -> None:
        super().__init__("gateway", "--port", "0", "--log-format", "json", "--model-name", MODEL, *args, env=env)
        self.url = ""
        self.process = self._spawn()

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

    def ready(self) -> bool:
        found = re.search(r'"url": "(http[^"]+)"', self.log)
        self.url = found[1] if found is not None and _alive(found[1]) else ""
        return bool(self.url)

    def client(self, key: str | None = None, **options: Any) -> httpx2.Client:
        """One that loads no certificates, which takes 20 ms: all is plain HTTP here."""
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=180, trust_env=False, verify=False, **options)


def _alive(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/healthz", timeout=10, trust_env=False, verify=False).status_code == 200
    except httpx2.TransportError:
        return False
