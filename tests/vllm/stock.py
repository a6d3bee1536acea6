"""A stock vLLM server process with our connector, in the environment that scripts/setup_vllm.sh makes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 300.0
PYTHON = Path(os.environ.get("VENV_VLLM", str(ROOT / ".venv-vllm"))).absolute() / "bin/python"


def environment() -> dict[str, str]:
    """Of vLLM's processes: quiet, offline, one thread, little KV."""
    return {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
    }


def transfer(store: str, **extra: Any) -> dict[str, Any]:
    """What `--ec-transfer-config` is given."""
    return {
        "ec_connector": "LookonceConnector",
        "ec_role": "ec_consumer",
        "ec_connector_extra_config": {"store": store, **extra},
    }


class StockServer:
    """`vllm serve MODEL` over HTTP, as a context manager."""

    def __init__(self, model: Path, directory: Path, config: dict[str, Any], *args: str) -> None:
        self.port = free_port()
        self.log_path = directory / "vllm.log"
        command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "model"]
        command += ["--port", str(self.port), "--dtype", "float32", "--max-model-len", "4096", "--enforce-eager"]
        command += ["--mm-processor-cache-gb", "0", "--limit-mm-per-prompt", '{"image": 0, "video": 0}']
        command += ["--ec-transfer-config", json.dumps(config), *args]
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=environment(), cwd=directory, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def log(self) -> str:
        """All that its processes have written."""
        return self.log_path.read_text(errors="replace")

    def wait_ready(self) -> StockServer:
        """Return once it answers; AssertionError with the end of the log otherwise."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
            except OSError:
                time.sleep(0.5)
            else:
                return self
        raise AssertionError(f"vLLM did not start:\n{self.log[-6000:]}")

    def chat(self, content: Sequence[dict[str, Any]], max_tokens: int = 16, timeout: float = 120) -> str:
        """The greedy answer to one user turn. Raises urllib.error.HTTPError."""
        body = {"model": "model", "messages": [{"role": "user", "content": list(content)}]}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/chat/completions",
            data=json.dumps(body | {"temperature": 0, "max_tokens": max_tokens}).encode(),
            headers={"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            answer: str = json.load(reply)["choices"][0]["message"]["content"]
        return answer

    def refuses(self, content: Sequence[dict[str, Any]]) -> str:
        """What the log says of a request that must fail."""
        before = len(self.log)
        with pytest.raises(urllib.error.HTTPError):
            self.chat(content)
        return self.log[before:]

    def __enter__(self) -> StockServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
