"""The whole of it: five thousand images, ten kills, restarts and pauses of everything. Minutes."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.moderate.conftest import MODEL, Pair, start_pair
from tests.moderate.scenes import area_under_curve, holds, make_images
from tests.processes import ServiceProcess
from tests.valkey import ValkeyServer

COUNT = int(os.environ.get("LOOKONCE_FULL_COUNT", "5000"))
LIMITS = {"command": 300 << 20, "vision": 1 << 30, "language": 1 << 30}  # bytes
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("many"), COUNT)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Services whose caches are full early in the run: by default they may take a quarter of the machine's memory."""
    args = ("--model", str(MODEL), "--store", f"file://{tmp_path_factory.mktemp('embeddings')}", "--threads", "1")
    caches = ("--l1-bytes", "16MiB", "--prefix-bytes", "48MiB", "--kv-bytes", "64MiB")
    vision = ServiceProcess("vision_service", *args, "--l1-bytes", str(16 << 20))
    services = Pair(vision, ServiceProcess("lm_service", *args, *caches, "--vision", vision.address))
    with services.vision, services.language:
        yield services


@pytest.fixture(scope="module")
def undisturbed(small, many, policy, tmp_path_factory):
    """The result, and anonymous resident bytes of the command and of both services while images were judged (not
    while the file was assembled). Pages of the store's file are none of a process's own memory."""
    out = tmp_path_factory.mktemp("full") / "results.parquet"
    with small.moderating(many.folder, policy, out) as run:
        pids = {"command": run.process.pid, "vision": small.vision.pid, "language": small.language.pid}
        held: dict[str, list[int]] = {name: [] for name in pids}
        while run.process.poll() is None:
            if len(list(out.parent.glob("results.parquet.run/parts/part-*"))) == max(1, COUNT // 1000):
                break
            for name, pid in pids.items():
                held[name].append(anonymous(pid))
            time.sleep(0.5)
        run.process.wait()
        assert run.process.returncode == 0, run.output
        print(run.output[-600:])
    return pq.read_table(out), {name: [size for size in sizes if size] for name, sizes in held.items()}


def anonymous(pid: int) -> int:
    """Bytes, 0 when the process is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"RssAnon:\s+(\d+) kB", text)
    return int(found[1]) << 10 if found else 0


def test_every_rule_separates_and_every_input_is_there_once(undisturbed, many):
    rows = undisturbed[0].to_pylist()
    names = ["/".join(row["source"].split("/")[-2:]) for row in rows]
    assert names == sorted(many.truth) and len(set(names)) == COUNT
    areas = {}
    for rule in [name.removeprefix("score_") for name in rows[0] if name.startswith("score_")]:
        positive, negative = [], []
        for row, name in zip(rows, names, strict=True):
            shapes = many.truth[name]
            assert (shapes is None) == (row["error"] is not None)
            if shapes is not None:
                (positive if holds(rule, shapes) else negative).append(row[f"score_{rule}"])
        areas[rule] = area_under_curve(positive, negative)
    print(areas)
    assert len(areas) == 12 and min(areas.values()) >= 0.99


@pytest.mark.parametrize("process", ["command", "vision", "language"])
def test_memory_stays_flat(undisturbed, process):
    held = undisturbed[1][process]
    eighths = [max(held[part * len(held) // 8 : (part + 1) * len(held) // 8 or 1]) for part in range(8)]
    print(f"{process}, MiB in each eighth of the run:", [size >> 20 for size in eighths])
    early, late = max(eighths[2:4]), max(eighths[6:])
    # A short run ends while its caches still fill: there only the whole is bounded.
    assert late < (early + (32 << 20) if COUNT >= 2000 else LIMITS[process])


def test_killed_ten_times(pair, many, policy, undisturbed, tmp_path):
    out, rng = tmp_path / "out.parquet", random.Random(7)
    for _ in range(10):
        with pair.moderating(many.folder, policy, out) as run:
            deadline = time.monotonic() + rng.uniform(2, 8)
            while time.monotonic() < deadline and run.process.poll() is None:
                time.sleep(0.05)
            run.process.kill()
            run.process.wait()
    done = pair.moderate(many.folder, policy, out, seconds=1500)
    assert done.returncode == 0, done.stderr
    assert pq.read_table(out).drop(["timings"]).equals(undisturbed[0].drop(["timings"]))


def test_restarts_a_dead_redis_and_a_pause(many, policy, undisturbed, tmp_path):
    out = tmp_path / "out.parquet"
    with ValkeyServer() as valkey:
        services = start_pair(valkey.url)
        with services.vision, services.language, services.moderating(many.folder, policy, out) as run:
            run.wait_for(r"[1-9]\d* of", seconds=120)
            valkey.kill()
            time.sleep(5)
            services.language.process.send_signal(signal.SIGSTOP)
            time.sleep(30)
            services.language.process.send_signal(signal.SIGCONT)
            services.vision.kill()
            services.vision.restart()
            services.language.kill()
            services.language.restart()
            assert run.wait_exit(1500) == 0, run.output
    assert pq.read_table(out).drop(["timings"]).equals(undisturbed[0].drop(["timings"]))
