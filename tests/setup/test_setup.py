"""scripts/setup.sh: where torch comes from, what it shows, what it installs. And README's two ways in, for real."""

from __future__ import annotations

import re
import socket

import pytest

from tests.setup.indexes import TORCH, Index, Project

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
