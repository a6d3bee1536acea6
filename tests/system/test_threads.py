"""Each model service computes with one team of threads, however it loads, checks and answers
(see lookonce.models.omp_thread)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lookonce.cli.model import BUNDLED
from tests.images import photograph, save
from tests.system.cluster import System

TEAM = 64  # more than all the other threads of a service together


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    many = ("--threads", str(TEAM + 1))
    with System(BUNDLED, tmp_path_factory.mktemp("threads"), vision_args=many, language_args=many) as running:
        yield running


def threads(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


BARE = """
import os, sys, threading, torch
torch.set_num_threads(int(sys.argv[1]))
computing = [threading.Event() for _ in range(int(sys.argv[2]))]

def compute(done):
    torch.zeros(1 << 22).add_(1)
    done.set()
    threading.Event().wait()

for done in computing:
    threading.Thread(target=compute, args=(done,), daemon=True).start()
    done.wait()
print(len(os.listdir("/proc/self/task")), flush=True)
os._exit(0)
"""


def bare(*teams: int) -> list[int]:
    """Threads of processes in which so many of them compute with torch."""
    commands = [[sys.executable, "-c", BARE, str(TEAM + 1), str(number)] for number in teams]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    return [int(process.communicate(timeout=120)[0]) for process in running]


def test_one_team_after_images_and_questions(system):
    image = system.upload(save(photograph("coffee", (800, 600)), "PNG"))["id"]
    assert len(system.ask(image, [f"Question {n}?" for n in range(4)], max_tokens=3)) == 4
    one, two = bare(1, 2)
    assert two - one >= TEAM, "each thread that computes has a team of its own"
    for service in (*system.visions, *system.languages):
        assert one <= threads(service.pid) < one + TEAM, service.module
