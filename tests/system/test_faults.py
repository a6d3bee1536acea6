"""What users see when parts fail: the table of failures, with real kills of real processes under load."""

from __future__ import annotations

import itertools

import httpx2
import pytest
import redis

from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from tests.images import odd_files, photograph, save
from tests.processes import ServiceProcess
from tests.system.clients import Clients, Load, roll
from tests.system.cluster import GatewayProcess, System
from tests.valkey import ValkeyServer


@pytest.fixture(scope="module")
def over_redis(model, tmp_path_factory):
    """One on a Redis, which is of any size until a test bounds it; likewise."""
    with (
        ValkeyServer(maxmemory_policy="noeviction") as valkey,
        System(model, tmp_path_factory.mktemp("redis"), store=valkey.url) as running,
    ):
        yield running, valkey


def test_redis_killed_and_restarted_in_the_middle_of_a_run(over_redis):
    system, valkey = over_redis
    image = system.upload(save(photograph("coffee", (150, 100)), "PNG"))["id"]
    with Load(system, image) as load:
        load.wait_for_more()
        valkey.kill()
        load.wait_for_more()
        assert system.http.get("/readyz").status_code == 200
        during = system.upload(save(photograph("chelsea", (150, 100)), "PNG"))["id"]
        assert "text" in system.ask(during, ["What?"], max_tokens=2)[0]
        valkey.start(valkey.port)
        system.wait_whole()
        load.wait_for_more()
    assert set(load.results) == {(200, None)}
    assert len(load.texts) == 1


def fill(client):
    for n in itertools.count():
        client.set(f"filler{n}", bytes(5_000))


def test_redis_that_is_full_and_then_hangs_fails_no_request(over_redis):
    system, valkey = over_redis
    with valkey.client() as client:
        client.config_set("maxmemory", client.info("memory")["used_memory"] + 50_000)
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            fill(client)
    image = system.upload(save(photograph("rocket", (150, 100)), "PNG"))["id"]
    assert "text" in system.ask(image, ["What?"], max_tokens=2)[0]
    valkey.stop()
    with Load(system, image) as load:
        load.wait_for_more(10)
    valkey.resume()
    assert set(load.results) == {(200, None)}


def test_vision_down_cached_images_answer_and_new_ones_are_503(single):
    known = single.upload(odd_files()["56x56"])["id"]
    new = {"file": ("a.png", save(photograph("chelsea", (75, 60)), "PNG"))}
    single.visions[0].kill()
    assert "text" in single.ask(known, ["What?"], max_tokens=2)[0]
    reply = single.http.post("/v1/images", files=new)
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "unavailable")
    assert float(reply.headers["retry-after"]) > 0
    single.visions[0].restart()
    single.wait_whole()
    assert single.http.post("/v1/images", files=new).status_code in (200, 201)


def test_killed_services_leave_the_embedded_store_intact(single):
    files = list(odd_files().values())
    before = {}
    for round_number, services in enumerate((single.languages, single.visions)):
        for data in files[round_number * 4 : round_number * 4 + 4]:
            image = single.upload(data)["id"]
            before[image] = single.ask(image, ["What is it?"], max_tokens=4)[0]["text"]
        with Load(single, next(iter(before)), 2) as load:
            load.wait_for_more()
            services[0].kill()
        services[0].restart()
        single.wait_whole()
    made = single.encodes()
    for image, text in before.items():
        assert single.ask(image, ["What is it?"], max_tokens=4)[0]["text"] == text
    assert single.encodes() == made  # nothing was lost


def test_erasure_reaches_every_process(double):
    before = double.encodes()
    data = odd_files()["56x56"]
    image = double.upload(data)["id"]
    double.ask(image, ["What?"], max_tokens=2)
    assert double.http.delete(f"/v1/images/{image}").status_code in (200, 204)
    assert double.http.get(f"/v1/images/{image}").status_code == 404
    assert double.http.post(f"/v1/images/{image}/questions", json={"questions": ["What?"]}).status_code == 404
    assert double.upload(data)["cached"] is False
    assert double.encodes() == before + 2


def test_a_language_replica_killed_under_load_is_covered_by_the_other(double):
    images = [double.upload(data)["id"] for data in list(odd_files().values())[:4]]
    with Load(double, images[0], 2) as load, Load(double, images[1], 2) as other:
        load.wait_for_more()
        double.languages[0].kill()
        load.wait_for_more(10)
        other.wait_for_more(10)
    statuses = load.results + other.results
    # at most what was past its first token on the dead replica may fail
    assert sum(status != (200, None) for status in statuses) <= 4
    assert statuses[-1] == (200, None)
    for image in images:
        assert "text" in double.ask(image, ["What?"], max_tokens=2)[0]
    double.languages[0].restart()
    double.wait_whole()


@pytest.mark.slow
def test_no_request_fails_while_replicas_are_restarted_in_turn(double):
    with Clients(double) as clients:
        for replica in (double.languages[0], double.visions[0]):
            clients.wait_for_more(16)
            roll(replica)
        clients.wait_for_more(16)
    assert clients.failed == []
    double.wait_whole()


def test_a_wrong_pair_is_refused_with_both_fingerprints_named(single, tmp_path):
    other = make_random_checkpoint(tmp_path / "other", max_pixels=100 * 28 * 28, seed=9)
    arguments = ("--model", str(other), "--store", single.store, "--device", "cpu", "--dtype", "float32")
    with ServiceProcess("vision_service", *arguments) as stranger:
        mixed = GatewayProcess(
            "--vision", stranger.address, "--lm", single.languages[0].address, "--store", "memory://"
        ).wait_ready()
        try:
            reply = httpx2.post(f"{mixed.url}/v1/images", files={"file": ("a.png", odd_files()["56x56"])}, timeout=60)
            image = reply.json()["id"]
            reply = httpx2.post(f"{mixed.url}/v1/images/{image}/questions", json={"questions": ["What?"]}, timeout=60)
            error = reply.json()["answers"][0]["error"] if reply.status_code == 200 else reply.json()["error"]
            assert error["code"] == "fingerprint_mismatch"
            assert System.describe(stranger).fingerprint[:8] in error["message"]
            assert System.describe(single.visions[0]).fingerprint[:8] in error["message"]
        finally:
            mixed.close()
