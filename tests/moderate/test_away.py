"""Services that are away in other ways than being dead: each image still ends once, and not as an error."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.moderate.conftest import MODEL, Pair, start_pair
from tests.processes import ServiceProcess

ARGUMENTS = ("--model", str(MODEL), "--store", "memory://", "--threads", "1")
SECONDS = 600
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def expected(pair, images, policy, tmp_path_factory):
    """Of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("undisturbed") / "results.parquet"
    done = pair.moderate(images.folder, policy, out, seconds=SECONDS)
    assert done.returncode == 0, done.stderr
    return settled(out)


def settled(path: Path):
    return pq.read_table(path).drop(["timings"])


def test_a_language_service_that_cannot_reach_the_vision_service_for_a_while(images, policy, expected, tmp_path):
    vision, link, out = ServiceProcess("vision_service", *ARGUMENTS), tmp_path / "link", tmp_path / "out.parquet"
    link.symlink_to(vision.address.removeprefix("unix:"))
    language = ServiceProcess("lm_service", *ARGUMENTS, "--vision", f"unix:{link}")
    options = ("--under-way", "8", "--progress-seconds", "0.2")
    with vision, language, Pair(vision, language).moderating(images.folder, policy, out, *options) as run:
        run.wait_for(r"[1-9]\d* of 100 images")
        link.unlink()
        vision.kill()  # and with it all embeddings that wait to be scored
        vision.restart()
        time.sleep(40)  # more than an image that is to blame itself would be given
        link.symlink_to(vision.address.removeprefix("unix:"))
        assert run.wait_exit(SECONDS) == 0, run.output
    assert settled(out).equals(expected)


def test_a_language_service_without_a_way_to_embeddings_beside_one_with(images, policy, expected, tmp_path):
    services, out = start_pair("memory://"), tmp_path / "out.parquet"
    lost = ServiceProcess("lm_service", *ARGUMENTS)
    with services.vision, services.language, lost:
        done = services.moderate(
            images.folder, policy, out, "--lm", f"{lost.address},{services.language.address}", seconds=SECONDS
        )
        assert done.returncode == 0, done.stderr
        assert settled(out).equals(expected)
        done = services.moderate(
            images.folder, policy, tmp_path / "none.parquet", "--lm", lost.address, seconds=SECONDS
        )
        assert done.returncode == 75 and "give the language services --vision" in done.stderr


def test_services_that_stand_still_for_longer_than_a_call_may_take(images, policy, expected, tmp_path):
    services, out = start_pair("memory://"), tmp_path / "out.parquet"
    options = ("--call-timeout", "3s", "--under-way", "8", "--progress-seconds", "0.2")
    with services.vision, services.language, services.moderating(images.folder, policy, out, *options) as run:
        run.wait_for(r"[1-9]\d* of 100 images")
        for service in (services.vision, services.language):
            service.process.send_signal(signal.SIGSTOP)
        time.sleep(10)
        for service in (services.language, services.vision):
            service.process.send_signal(signal.SIGCONT)
        assert run.wait_exit(SECONDS) == 0, run.output
    assert settled(out).equals(expected)
