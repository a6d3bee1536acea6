"""What each image installs is enough for its process: everything it imports, with all other distributions hidden. Its
health check asks where the process listens."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import tomllib
from contextlib import asynccontextmanager
from importlib import metadata
from pathlib import Path

import pytest

from lookonce.cli.vllm_environment import SUPPORTED
from lookonce.core.rpc.server import Server, ServerOptions
from tests.ports import free_port
from tests.processes import ROOT

HIDE = """
import importlib.util, sys, pkgutil, importlib
hidden, packages = set(sys.argv[1].split(",")), sys.argv[2].split(",")
class Hider:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in hidden:
            raise ModuleNotFoundError(f"no module named {name!r} in this image", name=name)
sys.meta_path.insert(0, Hider())
for package in packages:
    root = importlib.import_module(package)
    for found in pkgutil.walk_packages(getattr(root, "__path__", []), package + "."):
        if found.name != "lookonce.models.checkpoint.split" and not found.name.startswith("lm_service.engine.vllm."):
            importlib.import_module(found.name)
import uvloop  # what each process runs on, imported when it starts
print("whole")
"""
CORE = "lookonce.core.stores,lookonce.core.rpc,lookonce.core.telemetry"
TRACING = "opentelemetry.exporter.otlp.proto.grpc.trace_exporter"
LIGHT = f"{CORE},{TRACING},lookonce.cli.health"
PACKAGES = {
    "gateway": f"gateway,{LIGHT}",
    "vision": f"vision_service,lookonce.models.checkpoint,lookonce.models.kernels,{LIGHT}",
    "language": f"lm_service,lookonce.models.checkpoint,lookonce.models.kernels,{LIGHT}",
}


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def group(name):
    entries = project()["dependency-groups"][name]
    for entry in entries:
        yield from group(entry["include-group"]) if isinstance(entry, dict) else [entry]


def plain(name):
    return re.split(r"[<>=;!~\[ (]", name.strip())[0].lower().replace("_", "-").replace(".", "-")


def closure(names):
    """Distributions that installing these brings."""
    found, queue = set(), [plain(name) for name in names]
    while queue:
        name = queue.pop()
        if name in found:
            continue
        found.add(name)
        try:
            wanted = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        queue += [plain(entry) for entry in wanted if "extra ==" not in entry]
    return found


@pytest.mark.parametrize("part", ["gateway", "vision", "language"])
def test_groups_ask_for_what_the_project_asks_for(part):
    wanted = {*project()["project"]["dependencies"], *project()["project"]["optional-dependencies"]["tracing"]}
    assert set(group(part)) <= wanted


def test_vllms_image_asks_for_what_the_language_services_does_but_for_what_vllm_pins():
    """vLLM brings torch, transformers, tokenizers and a compiler of its own; tests/vllm runs in such an environment."""
    names, ours = ({plain(entry) for entry in group(part)} for part in ("language-vllm", "language"))
    assert ours - names == {"torch", "transformers", "tokenizers", "llvmlite", "numpy", "pillow"}
    assert names - ours == {"vllm", "ray", "orjson"}
    assert next(entry for entry in group("language-vllm") if plain(entry) == "vllm") == f"vllm=={SUPPORTED}"


@pytest.mark.parametrize(
    "part",
    ["gateway", pytest.param("vision", marks=pytest.mark.slow), pytest.param("language", marks=pytest.mark.slow)],
)
def test_an_image_holds_what_its_process_imports(part):
    brought = closure(group(part))
    assert ("torch" in brought) == (part != "gateway")
    hidden = {
        top for top, owners in metadata.packages_distributions().items()
        if top.isidentifier() and not {plain(owner) for owner in owners} & (brought | {"lookonce", "setuptools", "pip"})
    }  # fmt: skip
    assert {"transformers", "pytest"} - set(PACKAGES) <= hidden | brought
    command = [sys.executable, "-c", HIDE, ",".join(sorted(hidden)), PACKAGES[part]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "whole", done.stderr


@pytest.mark.parametrize(
    ("part", "variable"),
    [
        ("gateway", "LOOKONCE_GATEWAY_PORT"),
        ("vision", "LOOKONCE_VISION_LISTEN"),
        ("language", "LOOKONCE_LM_LISTEN"),
        ("language-vllm", "LOOKONCE_LM_LISTEN"),
    ],
)
async def test_the_health_check_asks_where_the_environment_lets_the_process_listen(part, variable):
    text = (ROOT / f"deploy/docker/{part}.Dockerfile").read_text()
    command = json.loads(re.search(r"^HEALTHCHECK .*\\\n\s+CMD (.+)$", text, re.M)[1])
    ready = ready_over_http if part == "gateway" else ready_over_grpc
    async with ready() as port:
        for listen, status in ((port, 0), (free_port(), 1)):
            told = {variable: str(listen) if part == "gateway" else f"0.0.0.0:{listen}"}
            path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
            check = await asyncio.create_subprocess_exec(
                *command, cwd=ROOT, env={"PATH": path, **told}, stdout=asyncio.subprocess.DEVNULL
            )
            assert await check.wait() == status


@asynccontextmanager
async def ready_over_grpc():
    server = Server(ServerOptions("0.0.0.0:0"))
    address = await server.start()
    await server.set_serving(True)
    yield int(address.rpartition(":")[2])
    await server.grpc.stop(None)


@asynccontextmanager
async def ready_over_http():
    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]
