"""`lookonce up --engine vllm`: started from its own environment, started again when vLLM dies, ended whole."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import psutil
import pytest

from lookonce.core.sample_images import bundled_samples
from tests.ports import free_port
from tests.vllm.stock import PYTHON, ROOT

pytestmark = pytest.mark.vllm


def eventually(true, seconds: float) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.2)


def test_up_starts_restarts_and_ends_it(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    command = [sys.executable, "-m", "lookonce", "up", "--port", str(port), "--data-dir", str(tmp_path / "data")]
    command += ["--engine", "vllm", "--vllm-python", str(PYTHON), "--dtype", "float32", "--device", "cpu"]
    command += ["--lm-kv-bytes", "128MiB", "--lm-prefix-bytes", "128MiB"]
    environment = {**os.environ, "LOOKONCE_LM_CONTEXT_LENGTH": "2048", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)
    sample = bundled_samples()[0]
    question, right = sample.questions[0]
    client = httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False, verify=False)

    def answer() -> str | None:
        try:
            image = client.post("/v1/images", files={"file": ("a.png", sample.path.read_bytes())}).json()["id"]
            reply = client.post(f"/v1/images/{image}/questions", json={"questions": [question]}, timeout=60)
            found: str | None = reply.json()["answers"][0]["text"]
        except (httpx2.TransportError, KeyError):
            return None
        return found

    try:
        eventually(lambda: process.poll() is not None or b"is ready" in log.read_bytes(), 180)
        assert process.poll() is None, log.read_text()
        assert answer() == right
        children = psutil.Process(process.pid).children(recursive=True)
        core = next(child for child in children if "EngineCore" in " ".join([child.name(), *child.cmdline()]))
        core.kill()
        eventually(lambda: b"restarting in" in log.read_bytes(), 60)
        eventually(lambda: answer() == right, 180)
        children = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.terminate()
        status = process.wait(90)
        client.close()
    assert status == 0, log.read_text()
    eventually(lambda: not any(child.is_running() and child.status() != "zombie" for child in children), 30)
    assert not list(Path("/dev/shm").glob("lookonce-lm-*"))
