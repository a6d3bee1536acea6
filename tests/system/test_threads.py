"""Each model service computes with one team of threads, however it loads, checks and answers
(see lookonce.models.omp_thread)."""

from __future__ import annotations

from pathlib import Path

import pytest

from lookonce.cli.model import BUNDLED
from tests.pictures import photograph, save
from tests.system.cluster import System

TEAM = 64  # more than all the other threads of a service together


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    many = ("--threads", str(TEAM + 1))
    with System(BUNDLED, tmp_path_factory.mktemp("threads"), vision_args=many, language_args=many) as running:
        yield running


def threads(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


def test_one_team_after_images_questions_and_a_restart(system):
    def ask() -> None:
        image = system.upload(save(photograph("coffee", (800, 600)), "PNG"))["id"]
        assert len(system.ask(image, [f"Question {n}?" for n in range(4)], max_tokens=3)) == 4

    ask()
    system.languages[0].restart()  # takes the embedding from the store, and checks it
    ask()
    for service in (*system.visions, *system.languages):
        # a team, and the pool of as many that torch makes when it is told a number of threads, and never uses
        assert 2 * TEAM <= threads(service.pid) < 3 * TEAM, service.module
