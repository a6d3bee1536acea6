"""scripts/setup.sh: where torch comes from, what it shows, what it installs. And README's two ways in, for real."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

import httpx2
import pytest

from tests.processes import ROOT
from tests.setup.indexes import TORCH, Index, Project, copy_of_tree

pytestmark = pytest.mark.slow
BASE = ("hatchling==1.27", "editables==0.5", "numpy==2.4.0", "numpy==2.5.0", "ruff==0.14")
PLAIN = (f"torch=={TORCH}", "nvidia-cublas==13.1")
CPU = f"torch=={TORCH}+cpu"


@pytest.fixture(scope="module")
def cpu_index(tmp_path_factory) -> Index:
    """As PyTorch's index of CPU wheels: torch and nothing else."""
    return Index(tmp_path_factory.mktemp("cpu"), CPU)


@pytest.fixture(scope="module")
def package_index(tmp_path_factory) -> Index:
    """As PyPI: torch with CUDA's libraries."""
    return Index(tmp_path_factory.mktemp("plain"), *BASE, *PLAIN)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    return Project(tmp_path_factory.mktemp("project"))


def places(said: str) -> list[str]:
    """Where torch was looked for, in order."""
    return re.findall(r"^setup: +\d+ s  torch [\d.]+,?(?: CPU build,)? from (.*)$", said, re.M)


def test_first_what_pip_knows(project, tmp_path, cpu_index):
    said = project.set_up(Index(tmp_path, *BASE, *PLAIN, CPU), cpu_index.url)
    assert places(said) == ["what pip knows"]
    found = project.installed()
    assert found["torch"] == f"{TORCH}+cpu" and "nvidia_cublas" not in found
    assert found["numpy"] == "2.4.0", "constraints hold"
    assert "ruff" not in found


def test_then_pytorchs_index_of_cpu_wheels(project, package_index, cpu_index):
    said = project.set_up(package_index, cpu_index.url)
    assert places(said) == ["what pip knows", cpu_index.url]
    assert "it has none" in said and project.installed()["torch"] == f"{TORCH}+cpu"


def test_then_plain_torch_with_a_word_of_its_size(project, package_index):
    with socket.socket() as closed:  # bound, not listening: connections are refused
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/cpu"
        said = project.set_up(package_index, url, EXTRAS="dev")
    first, second, third = places(said)
    assert (first, second) == ("what pip knows", url)
    assert third.startswith("PyPI: large") and "it can't be reached" in said and "TORCH_INDEX=URL" in said
    found = project.installed()
    assert found["torch"] == TORCH and "nvidia_cublas" in found and "ruff" in found


def test_an_index_that_was_given_comes_first(project, tmp_path, package_index, cpu_index):
    mirror = Index(tmp_path / "mirror", CPU)
    said = project.set_up(Index(tmp_path / "known", *BASE, *PLAIN, CPU), package_index.url, TORCH_INDEX=mirror.url)
    assert places(said) == [mirror.url]
    nothing = Index(tmp_path / "nothing", "numpy==2.4.0")
    said = project.set_up(package_index, cpu_index.url, TORCH_INDEX=nothing.url)
    assert places(said)[:2] == [nothing.url, "what pip knows"] and places(said)[2].startswith("PyPI")


@pytest.mark.timeout(120)
def test_an_index_that_never_answers_is_given_up(project, package_index):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        said = project.set_up(package_index, f"http://127.0.0.1:{silent.getsockname()[1]}/cpu")
    assert "it can't be reached" in said and "still asking package indexes" in said
    assert project.installed()["torch"] == TORCH


COMMANDS = re.findall(r"^    (.*?) +# (.*)$", (ROOT / "README.md").read_text().partition("## Install")[2], re.M)[:2]


OWN = ("PYTHONPATH", "VIRTUAL_ENV", "MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "ARGS")
"""What this test's own environment holds, of a `make test-slow ARGS=...` too."""


def run(folder: Path, command: str, **environment: str | None) -> str:
    """The output of a shell line in a folder, without what this test's own environment holds; None: unset."""
    env = {name: value for name, value in os.environ.items() if name not in OWN}
    env = {name: value for name, value in {**env, **environment}.items() if value is not None}
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_in_a_clone_where_pip_knows_only_pypi(tmp_path):
    """README's first line and the demo, with gigabytes of plain torch, without pip's configuration."""
    if shutil.disk_usage(tmp_path).free < 16 << 30:
        pytest.skip("plain torch wants 16 GB of free disk")
    try:
        httpx2.get("https://pypi.org/simple/torch/", timeout=30).raise_for_status()
    except httpx2.HTTPError:
        pytest.skip("PyPI is not reachable")
    clone = copy_of_tree(tmp_path / "clone")
    try:
        unset = {name: None for name in os.environ if name.startswith(("PIP_", "TORCH_"))}
        pip = unset | {"PIP_CONFIG_FILE": os.devnull}
        said = run(clone, "make demo && " + COMMANDS[0][0] + " && lookonce --version && pip list", **pip)
        assert "16 of 16 answers right; 16 of 16 equal the unsplit model's." in said
        assert re.search(r"^lookonce \d", said, re.M) and re.search(rf"^torch +{re.escape(TORCH)}\b", said, re.M)
        assert not re.search(r"^(pytest|ruff|mypy) ", said, re.M), "no tools of development"
        assert said.count("done: .venv") == 1, "the second line found all in place"
    finally:
        shutil.rmtree(clone)


def test_from_the_wheel(tmp_path):
    """README's second line in an environment of its own, and what it needs from the wheel."""
    clone = copy_of_tree(tmp_path / "clone")
    run(tmp_path, "python3 -m venv own")
    path = f"{tmp_path / 'own' / 'bin'}:{os.environ['PATH']}"
    run(clone, COMMANDS[1][0], PATH=path)
    said = run(tmp_path, "lookonce --version && lookonce demo", PATH=path)
    assert "16 of 16 answers right" in said
    [policy] = (tmp_path / "own").rglob("lookonce/data/shapes.yaml")
    assert policy.read_bytes() == (ROOT / "examples" / "policies" / "shapes.yaml").read_bytes()
