"""Each client with its defaults: images as data, by URL and by our id, streamed or not, a second turn, its errors.
The slow suite drives the quickly installed ones; `make test-clients` all of them."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from tests.cli.commands import Up
from tests.clients import page
from tests.clients.environments import clean_environment, command_of
from tests.fetching.servers import ImageServer, answer
from tests.processes import ROOT

SAMPLES = ROOT / "lookonce" / "data" / "samples"
CHECKPOINT = ROOT / "lookonce" / "data" / "shapes"
OFTEN = ("openai", "litellm", "langchain", "node:openai", "node:ai_sdk")
OTHERS = (
    "llama_index",
    "autogen",
    "pydantic_ai",
    "instructor",
    "openai_agents",
    "typesafe",
    "anthropic",
    "ollama",
    "haystack",
    "llm",
    "aiperf",
    "litellm_proxy",
    "guidellm",
)
CLIENTS = OFTEN + (OTHERS if os.environ.get("LOOKONCE_TEST_CLIENTS") == "all" else ())
SECONDS = 300.0  # of one drive
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A system with the bundled model, which may fetch from one server here; and the file that tells drives of it."""
    file = (SAMPLES / "one-star.png").read_bytes()
    with ImageServer() as hosted:
        hosted.routes["/star.png"] = answer(file)
        allowed = {"LOOKONCE_GATEWAY_FETCH_ALLOW_NETWORKS": "127.0.0.1/32"}
        allowed["LOOKONCE_GATEWAY_FETCH_PORTS"] = str(hosted.port)
        with Up(tmp_path_factory.mktemp("up"), "--port", "0", **allowed) as up:
            up.wait_for("lookonce is ready")
            server = up.system.url
            uploaded = httpx2.post(f"{server}/v1/images", files={"file": file}, trust_env=False).json()["id"]
            images = {"data": f"data:image/png;base64,{base64.b64encode(file).decode()}"}
            images |= {"url": f"{hosted.url}/star.png", "id": f"lookonce:{uploaded}"}
            told = {"server": server, "images": images, "checkpoint": str(CHECKPOINT)}
            path = tmp_path_factory.mktemp("scene") / "scene.json"
            path.write_text(json.dumps({**told, "question": "Name the green shape.", "answer": "star"}))
            yield path


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_with_its_defaults(client: str, scene: Path, tmp_path: Path) -> None:
    if client.startswith("node:") and shutil.which("npm") is None:
        pytest.skip("needs node and npm")
    env = clean_environment(SCENE=str(scene))
    done = subprocess.run(
        command_of(client),
        cwd=tmp_path,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    page.keep(client, done.stdout)
