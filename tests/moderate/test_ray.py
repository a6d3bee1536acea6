"""--ray: a local cluster of two nodes gives the rows of one process, also when it is killed and run again."""

from __future__ import annotations

import importlib.util
import time

import pyarrow.parquet as pq
import pytest

from tests.cli.commands import until
from tests.moderate.conftest import MODEL, Pair, start_pair
from tests.moderate.poison import MARKER, MortalService, poisoned
from tests.processes import ServiceProcess

SECONDS = 600  # for what took 20 to 60 on two busy cores
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (lookonce[slow])"),
    pytest.mark.filterwarnings("ignore"),  # Ray's own
]


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 128 << 20})
    made.add_node(num_cpus=1, object_store_memory=128 << 20)
    yield made.address
    made.shutdown()


def test_two_nodes_give_the_same_rows_and_take_up_again(cluster, pair, images, policy, tmp_path):
    alone, out = tmp_path / "alone.parquet", tmp_path / "ray.parquet"
    assert pair.moderate(images.folder, policy, alone, "--part-rows", "20").returncode == 0
    options = ("--part-rows", "20", "--ray", cluster, "--ray-actors", "2")
    with pair.moderating(images.folder, policy, out, *options) as run:
        deadline = time.monotonic() + SECONDS
        while run.process.poll() is None and not list(tmp_path.glob("ray.parquet.run/parts/part-*")):
            assert time.monotonic() < deadline, run.output
            time.sleep(0.05)
        run.process.kill()
        run.process.wait()
    done = pair.moderate(images.folder, policy, out, *options, seconds=SECONDS)
    assert done.returncode == 0, done.stderr
    expected, found = (pq.read_table(path).drop(["timings"]) for path in (alone, out))
    assert found.equals(expected)


def test_a_service_that_stays_away_ends_the_run_for_now(cluster, images, policy, tmp_path):
    services = start_pair("memory://")
    with services.vision, services.language:
        options = ("--ray", cluster, "--ray-actors", "1", "--part-rows", "20", "--patience", "3s")
        with services.moderating(images.folder, policy, tmp_path / "out.parquet", *options) as run:
            until((tmp_path / "out.parquet.run").exists, SECONDS, lambda: run.output)
            services.language.kill()
            assert run.wait_exit(SECONDS) == 75, run.output
            assert "did not answer" in run.output and "Run the same command again" in run.output


def test_an_image_that_kills_the_vision_service_is_found_when_no_worker_asks(cluster, pair, images, policy, tmp_path):
    source, alone, out = tmp_path / "source", tmp_path / "alone.parquet", tmp_path / "out.parquet"
    source.mkdir()
    good = [images.folder / name for name, truth in sorted(images.truth.items()) if truth is not None]
    for number, path in enumerate(good[:30]):
        (source / f"{number:03}.png").write_bytes(poisoned(path, MARKER) if number == 10 else path.read_bytes())
    assert pair.moderate(source, policy, alone).returncode == 0
    args = ("--model", str(MODEL), "--threads", "1", "--store", f"file://{tmp_path}/store")
    vision = MortalService(ServiceProcess("vision_service", *args), MARKER)
    with vision, ServiceProcess("lm_service", *args, "--vision", vision.address) as language:
        options = ("--ray", cluster, "--ray-actors", "2")
        done = Pair(vision, language).moderate(source, policy, out, *options, seconds=SECONDS)
        assert done.returncode == 0, done.stderr
    expected, found = (pq.read_table(path).drop(["timings"]).to_pylist() for path in (alone, out))
    assert found[10]["error"] == "service_crashed" and found[10]["score_star"] is None
    assert found[:10] + found[11:] == expected[:10] + expected[11:]
