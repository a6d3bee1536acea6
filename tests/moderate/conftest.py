"""The bundled model's two services, and a folder of images with their truth, for all tests of a worker."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest

from lookonce.moderation.batch.results import Results
from tests.cli.commands import Background, lookonce
from tests.moderate.scenes import Images, make_images, policy_text
from tests.processes import ROOT, ServiceProcess

MODEL = ROOT / "lookonce/data/shapes"
COUNT = 100


@dataclass
class Pair:
    """A vision and a language service on one store."""

    vision: ServiceProcess
    language: ServiceProcess

    def arguments(self) -> list[str]:
        return ["--vision", self.vision.address, "--lm", self.language.address]

    def moderate(self, source, policy, out, *more, seconds: float = 150):
        """`lookonce moderate`, to its end."""
        command = ["moderate", source, "--policy", policy, "--out", out, *self.arguments(), *more]
        return lookonce(*command, seconds=seconds)

    def moderating(self, source, policy, out, *more) -> Background:
        """`lookonce moderate`, in the background."""
        import sys

        command = ["moderate", source, "--policy", policy, "--out", out, *self.arguments(), *more]
        return Background(sys.executable, "-m", "lookonce", *map(str, command))


def start_pair(store: str, *more: str) -> Pair:
    args = ("--model", str(MODEL), "--store", store, "--threads", "1", *more)
    vision = ServiceProcess("vision_service", *args)
    return Pair(vision, ServiceProcess("lm_service", *args, "--vision", vision.address))


@pytest.fixture(scope="session")
def pair(tmp_path_factory) -> Iterator[Pair]:
    services = start_pair(f"file://{tmp_path_factory.mktemp('embeddings')}")
    with services.vision, services.language:
        yield services


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Images:
    return make_images(tmp_path_factory.mktemp("images"), COUNT, broken=0.03)


@pytest.fixture(scope="session")
def policy(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("policy") / "policy.yaml"
    path.write_text(policy_text())
    return path


@pytest.fixture(scope="session")
def results(pair, images, policy, tmp_path_factory) -> Path:
    """Of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("results") / "results.parquet"
    done = pair.moderate(images.folder, policy, out, "--part-rows", "25")
    assert done.returncode == 0, done.stderr
    assert f"{COUNT} images" in done.stdout and "crowded" in done.stdout
    assert list(out.parent.iterdir()) == [out]  # nothing is left behind
    return out


def settled(path: Path) -> pa.Table:
    """A result without its timings."""
    return pa.Table.from_batches(Results.at(path).batches()).drop(["timings"])
