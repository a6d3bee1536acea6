"""Package indexes in folders, of wheels a kilobyte small, and a project for scripts/setup.sh to set up from them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.processes import ROOT
from tests.setup.wheels import write_wheel

TORCH = "2.13.0"
PUBLIC = "https://download.pytorch.org/whl/cpu"
PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "lookonce"
version = "0.1.0"
dependencies = ["torch>=2.8", "numpy>=2"]
optional-dependencies = {dev = ["ruff"]}
"""
BACKEND = """
from tests.setup.wheels import write_wheel

def build_editable(directory, settings=None, metadata=None):
    return write_wheel(directory, "lookonce", "0.1.0", ["torch>=2.8", "numpy>=2", "ruff; extra == 'dev'"], ["dev"]).name
"""


class Index:
    """A package index as a folder: `url` is what pip is given."""

    def __init__(self, folder: Path, *packages: str) -> None:
        self.url = folder.as_uri()
        for package in packages:
            name, _, version = package.partition("==")
            page = folder / name
            page.mkdir(parents=True, exist_ok=True)
            wheel = write_wheel(page, name, version, ["nvidia-cublas"] if package == f"torch=={TORCH}" else [])
            with (page / "index.html").open("a") as file:
                file.write(f'<a href="{wheel.name}">{wheel.name}</a>\n')


class Project:
    """A folder with the product's scripts/setup.sh, in which nothing else is large, and its virtual environment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "scripts").mkdir(parents=True)
        (folder / "pyproject.toml").write_text(PROJECT)
        (folder / "backend.py").write_text(BACKEND)
        (folder / "constraints.txt").write_text(f"torch=={TORCH}\nnumpy==2.4.0\n")
        (folder / "bin").mkdir()  # no GPU here, whatever the machine has
        (folder / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexit 1\n")
        (folder / "bin" / "nvidia-smi").chmod(0o755)

    def set_up(self, knows: Index, public: str, **environment: str) -> str:
        """What setup.sh says where pip knows one index and PyTorch's stands at `public`. The environment is made once;
        torch is taken out of it each time."""
        script = (ROOT / "scripts" / "setup.sh").read_text()
        assert script.count(PUBLIC) == 1
        (self.folder / "scripts" / "setup.sh").write_text(script.replace(PUBLIC, public))
        python = self.folder / ".venv" / "bin" / "python"
        env = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "TORCH_"))}
        env |= {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": knows.url, "PYTHON": sys.executable}
        env |= {"PYTHONPATH": str(ROOT), "PATH": f"{self.folder / 'bin'}:{env['PATH']}", **environment}
        if python.exists():
            taken_out = [python, "-m", "pip", "uninstall", "-q", "-y", "torch", "nvidia-cublas", "ruff"]
            subprocess.run(taken_out, env=env, check=True, capture_output=True)
        done = subprocess.run(
            ["bash", self.folder / "scripts" / "setup.sh"], env=env, capture_output=True, text=True, timeout=180
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def installed(self) -> dict[str, str]:
        """Name and version of each package."""
        found = self.folder.glob(".venv/lib/python*/site-packages/*.dist-info")
        return dict(path.name.removesuffix(".dist-info").split("-", 1) for path in found)


def copy_of_tree(folder: Path) -> Path:
    """The files that git knows, as a fresh clone has them."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return folder
