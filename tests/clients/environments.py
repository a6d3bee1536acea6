"""Makes the environments that the drives run in, under .clients/: once for each list of requirements."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.processes import ROOT

HERE = Path(__file__).parent
KEPT = ROOT / ".clients"
SECONDS = 900.0  # to install one client


def command_of(client: str) -> list[str]:
    """What runs the client's drive. CalledProcessError or TimeoutExpired when its environment can't be made."""
    if client.startswith("node:"):
        return ["node", str(_node() / f"{client.removeprefix('node:')}.mjs")]
    script = str(HERE / f"with_{client}.py")
    requirements = HERE / "requirements" / f"{client}.txt"
    python = _python(client, requirements) if requirements.is_file() else Path(sys.executable)
    return [str(python), script]


def clean_environment(**extra: str) -> dict[str, str]:
    """Without what would lead a client to this project's packages, or to a server of the user's."""
    ours = ("LOOKONCE_", "OPENAI_", "PYTHON", "VIRTUAL_ENV", "COVERAGE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**kept, "PYTHONWARNINGS": "default", "no_proxy": "127.0.0.1", **extra}


def _python(client: str, requirements: Path) -> Path:
    folder = _folder(client, requirements.read_bytes())
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        _run(sys.executable, "-m", "venv", "--clear", str(folder))
        _run(str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(requirements))
        (folder / "ready").touch()
    return python


def _node() -> Path:
    folder = _folder("node", (HERE / "node" / "package.json").read_bytes())
    shutil.copytree(HERE / "node", folder, dirs_exist_ok=True)
    if not (folder / "ready").exists():
        _run(
            "npm",
            "install",
            "--no-package-lock",
            "--no-audit",
            "--no-fund",
            "--ignore-scripts",
            "--prefix",
            str(folder),
        )
        (folder / "ready").touch()
    return folder


def _folder(name: str, requirements: bytes) -> Path:
    return KEPT / f"{name}-{hashlib.sha256(requirements).hexdigest()[:8]}"


def _run(*command: str) -> None:
    subprocess.run(command, env=clean_environment(), check=True, stdin=subprocess.DEVNULL, timeout=SECONDS)
