"""Images that kill a service whenever it is asked about them: the run ends, and they alone are errors."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lookonce.core.identity import image_digest
from tests.moderate.conftest import MODEL, Pair
from tests.moderate.poison import MARKER, MortalService, poisoned
from tests.processes import ServiceProcess

SECONDS = 600
COUNT = 40
ARGUMENTS = ("--model", str(MODEL), "--threads", "1")
OPTIONS = ("--under-way", "8", "--part-rows", "10", "--progress-seconds", "0.2")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(images, tmp_path_factory) -> Path:
    """Good images; one of them, in the middle, poisoned, and again near the end."""
    folder = tmp_path_factory.mktemp("poisoned")
    good = [name for name, truth in sorted(images.truth.items()) if truth is not None and name not in images.copies]
    for number, name in enumerate(good[:COUNT]):
        shutil.copyfile(images.folder / name, folder / f"{number:03}.png")
    for number in (20, 35):
        (folder / f"{number:03}.png").write_bytes(poisoned(images.folder / good[20], MARKER))
    return folder


@pytest.fixture(scope="module")
def expected(pair, source, policy, tmp_path_factory) -> list[dict]:
    """Rows of services that look at it unharmed."""
    out = tmp_path_factory.mktemp("unharmed") / "results.parquet"
    done = pair.moderate(source, policy, out, seconds=SECONDS)
    assert done.returncode == 0, done.stderr
    return rows_of(out)


def rows_of(out: Path) -> list[dict]:
    return pq.read_table(out).drop(["timings"]).to_pylist()


def check(out: Path, expected: list[dict], service: str) -> None:
    """The poisoned image and its copy are errors that say so; all else is as it would have been."""
    rows = rows_of(out)
    assert [row["source"] for row in rows] == [row["source"] for row in expected]
    for row, unharmed in zip(rows, expected, strict=True):
        if row["index"] in (20, 35):
            assert row["error"] == "service_crashed" and row["error_message"].startswith(f"the {service} died twice")
            assert row["score_star"] is None and row["flagged"] is None
            assert row["duplicate_of_index"] == (20 if row["index"] == 35 else None)
        else:
            assert row == unharmed


def test_an_image_that_kills_the_vision_service(source, policy, expected, tmp_path):
    store, out = f"file://{tmp_path}/store", tmp_path / "out.parquet"
    vision = MortalService(ServiceProcess("vision_service", *ARGUMENTS, "--store", store), MARKER)
    language = ServiceProcess("lm_service", *ARGUMENTS, "--store", store, "--vision", vision.address)
    with vision, language:
        done = Pair(vision, language).moderate(source, policy, out, *OPTIONS, seconds=SECONDS)
        assert done.returncode == 0, done.stderr
        check(out, expected, "vision service")
        assert vision.deaths <= 6, done.stderr
        done = Pair(vision, language).moderate(source, policy, out, *OPTIONS, seconds=SECONDS)
        assert done.returncode == 0 and "finished already" in done.stderr


def test_an_image_that_kills_the_language_service_in_a_run_that_is_killed_too(source, policy, expected, tmp_path):
    store, out = f"file://{tmp_path}/store", tmp_path / "out.parquet"
    vision = ServiceProcess("vision_service", *ARGUMENTS, "--store", store)
    service = ServiceProcess("lm_service", *ARGUMENTS, "--store", store, "--vision", vision.address)
    language = MortalService(service, image_digest((source / "020.png").read_bytes()))
    with vision, language:
        services = Pair(vision, language)
        with services.moderating(source, policy, out, *OPTIONS) as run:
            run.wait_for("a service died of one image", seconds=SECONDS)
            run.process.kill()
        done = services.moderate(source, policy, out, *OPTIONS, seconds=SECONDS)
        assert done.returncode == 0 and "going on after" in done.stderr, done.stderr
        check(out, expected, "language service")


def test_a_service_that_dies_of_everything_is_no_images_fault(source, policy, tmp_path):
    store, out = f"file://{tmp_path}/store", tmp_path / "out.parquet"
    vision = MortalService(ServiceProcess("vision_service", *ARGUMENTS, "--store", store), b"\x89PNG\r\n\x1a\n")
    language = ServiceProcess("lm_service", *ARGUMENTS, "--store", store, "--vision", vision.address)
    with vision, language:
        more = ("--patience", "45s")
        done = Pair(vision, language).moderate(source, policy, out, *OPTIONS, *more, seconds=SECONDS)
        assert done.returncode == 75 and "Run the same command again" in done.stderr, done.stderr
        assert "a service died of one image" in done.stderr
    assert not list(tmp_path.glob("out.parquet.run/parts/part-*"))


def test_services_that_are_killed_again_and_again_are_no_images_fault(images, source, policy, expected, tmp_path):
    store, out = f"file://{tmp_path}/store", tmp_path / "out.parquet"
    vision = ServiceProcess("vision_service", *ARGUMENTS, "--store", store)
    language = ServiceProcess("lm_service", *ARGUMENTS, "--store", store, "--vision", vision.address)
    rng, services = random.Random(3), Pair(vision, language)
    with vision, language, services.moderating(source, policy, out, *OPTIONS) as run:
        run.wait_for(r"[1-9]\d* of 40 images")
        for number in range(6):
            victim = (vision, language)[number % 2]
            victim.kill()
            victim.restart()
            time.sleep(rng.uniform(0.0, 0.5))
        assert run.wait_exit(SECONDS) == 0, run.output
    assert rows_of(out) == expected
