"""The whole of it: five thousand pictures, ten kills, restarts and pauses of everything. Minutes."""

from __future__ import annotations

import os
import random
import signal
import time

import psutil
import pyarrow.parquet as pq
import pytest

from tests.moderate.conftest import start_pair
from tests.moderate.scenes import area_under_curve, holds, make_pictures
from tests.valkey import ValkeyServer

COUNT = int(os.environ.get("LOOKONCE_FULL_COUNT", "5000"))
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("many"), COUNT)


@pytest.fixture(scope="module")
def undisturbed(pair, many, policy, tmp_path_factory):
    """The result, and resident bytes of the command while pictures were judged (not while the file was assembled)."""
    out = tmp_path_factory.mktemp("full") / "results.parquet"
    resident = []
    with pair.moderating(many.folder, policy, out) as run:
        while run.process.poll() is None:
            if len(list(out.parent.glob("results.parquet.run/parts/part-*"))) < max(1, COUNT // 1000):
                resident.append(psutil.Process(run.process.pid).memory_info().rss)
            time.sleep(0.5)
        assert run.process.returncode == 0, run.output
        print(run.output[-600:])
    return pq.read_table(out), [size for size in resident if size]


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


def test_memory_stays_flat(undisturbed):
    _, resident = undisturbed
    quarter = len(resident) // 4
    early, late = max(resident[quarter : 2 * quarter]), max(resident[3 * quarter :])
    print(f"resident: {early >> 20} MiB in the second quarter, {late >> 20} MiB in the last")
    # A short run ends while its caches still fill: there only the whole is bounded.
    assert late < (early + (32 << 20) if COUNT >= 2000 else 300 << 20)


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
