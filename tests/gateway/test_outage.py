"""What a Redis in trouble means for images: "not there", "no room" and "it can't be told now" are different answers,
and what was acknowledged meanwhile holds afterwards."""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import httpx2
import pytest

from gateway.images.image_records import CONFIRMED, file_key
from gateway.images.library import parse_id
from tests.faulty_proxy import FaultyProxy
from tests.gateway.conftest import Services
from tests.gateway.processes import GatewayProcess
from tests.gateway.test_failures import eventually, lose_everything
from tests.valkey import ValkeyServer

ImageFile = Callable[..., bytes]
QUICK = "connect_timeout=500ms&socket_timeout=500ms&operation_timeout=1s"


@dataclass
class Scene:
    """Two gateways over one Redis behind a proxy."""

    valkey: ValkeyServer
    proxy: FaultyProxy
    first: httpx2.Client
    second: httpx2.Client


@pytest.fixture(scope="module")
def shared(services: Services) -> Iterator[Scene]:
    with ValkeyServer() as valkey, FaultyProxy(valkey.port) as proxy:
        arguments = (*services.arguments(), "--store", f"{proxy.url}?{QUICK}")
        with (
            GatewayProcess(*arguments) as one,
            GatewayProcess(*arguments) as two,
            one.client() as first,
            two.client() as second,
        ):
            yield Scene(valkey, proxy, first, second)


@pytest.fixture
def scene(shared: Scene) -> Scene:
    """With every circuit breaker closed, whatever the test before has done."""
    shared.proxy.set("none")
    for http in (shared.first, shared.second):
        assert eventually(lambda http=http: store_in_use(http))
    return shared


def store_in_use(http: httpx2.Client) -> bool:
    """Asks for something first: a breaker that is open tries again when it is used."""
    http.get("/v1/images/nothing")
    states = re.findall(r"^lookonce_store_degraded\{.*\} (\S+)$", http.get("/metrics").text, re.MULTILINE)
    assert states
    return set(states) == {"0.0"}


def upload(http: httpx2.Client, data: bytes, **fields: str) -> httpx2.Response:
    return http.post("/v1/images", files={"file": data}, data=fields)


def chat(http: httpx2.Client, data: bytes) -> httpx2.Response:
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]
    return http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": content}], "max_tokens": 2})


def refused(reply: httpx2.Response) -> bool:
    return (
        reply.status_code == 503 and reply.json()["error"]["code"] == "unavailable" and "retry-after" in reply.headers
    )


@pytest.mark.parametrize("mode", ["reset", pytest.param("half", marks=pytest.mark.slow)])
def test_a_pinned_file_that_could_not_be_written_is_not_a_full_store(
    scene: Scene, image_file: ImageFile, mode: str
) -> None:
    data = image_file()
    scene.proxy.set(mode)
    reply = upload(scene.first, data, pinned="true")
    assert refused(reply), reply.text
    scene.proxy.set("none")
    assert eventually(lambda: upload(scene.first, data, pinned="true").status_code in (200, 201))


def test_what_could_not_be_looked_for_is_not_gone(scene: Scene, image_file: ImageFile) -> None:
    image = upload(scene.first, image_file(), alias="cat").json()["id"]
    scene.proxy.set("reset")
    for path in (f"/v1/images/{image}", "/v1/images/cat", "/v1/images"):
        reply = scene.second.get(path)
        assert refused(reply), (path, reply.text)
    scene.proxy.set("none")
    for path in (f"/v1/images/{image}", "/v1/images/cat"):
        assert eventually(lambda path=path: scene.second.get(path).status_code == 200)
    assert scene.second.get("/v1/images").json()["data"][0]["id"] == image


def test_a_kept_file_that_could_not_be_read_is_not_gone(
    scene: Scene, services: Services, image_file: ImageFile
) -> None:
    image = upload(scene.first, image_file()).json()["id"]
    lose_everything(services, image)
    scene.proxy.set("reset")
    reply = scene.first.post(f"/v1/images/{image}/questions", json={"questions": ["What?"], "max_tokens": 2})
    assert refused(reply), reply.text
    assert refused(scene.first.patch(f"/v1/images/{image}", json={"pinned": True}))


def test_an_image_that_came_with_the_request_needs_no_kept_file(
    scene: Scene, services: Services, image_file: ImageFile
) -> None:
    data = image_file()
    first = chat(scene.first, data)
    assert first.status_code == 200, first.text
    lose_everything(services, upload(scene.second, data).json()["id"])
    scene.proxy.set("reset")
    again = chat(scene.first, data)
    assert again.status_code == 200, again.text
    assert again.json()["choices"][0]["message"] == first.json()["choices"][0]["message"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["half", "hang"])
def test_an_upload_that_was_acknowledged_in_an_outage_outlives_the_deletion_before_it(
    scene: Scene, image_file: ImageFile, mode: str
) -> None:
    data = image_file()
    image = upload(scene.first, data).json()["id"]
    assert scene.first.delete(f"/v1/images/{image}").json()["complete"] is True
    assert scene.first.get(f"/v1/images/{image}").status_code == 404
    scene.proxy.set(mode)
    reply = upload(scene.first, data, alias="again")
    assert reply.status_code in (200, 201), reply.text
    assert scene.first.get(f"/v1/images/{image}").status_code == 200
    scene.proxy.set("none")
    end = time.monotonic() + 4  # the breaker closes within
    while time.monotonic() < end:
        assert scene.first.get(f"/v1/images/{image}").status_code == 200
        time.sleep(0.1)
    assert eventually(lambda: scene.first.get("/v1/images/again").status_code == 200)
    assert eventually(lambda: scene.second.get(f"/v1/images/{image}").status_code == 200)
    assert scene.second.get("/v1/images/again").json()["id"] == image
    assert image in [item["id"] for item in scene.first.get("/v1/images").json()["data"]]
    with scene.valkey.client() as client:
        assert client.exists(f"lookonce:images:{file_key(parse_id(image)).hex()}"), "the file, too, is in Redis again"


@pytest.mark.slow
def test_an_upload_in_an_outage_takes_nothing_from_the_image_it_is(scene: Scene, image_file: ImageFile) -> None:
    """A gateway that can't see that an image is pinned and named keeps it all the same, and joins both afterwards."""
    data = image_file()
    image = upload(scene.first, data, pinned="true", alias="kept").json()["id"]
    scene.proxy.set("reset")
    assert upload(scene.second, data).status_code in (200, 201)
    scene.proxy.set("none")

    def whole(http: httpx2.Client) -> bool:
        found = http.get("/v1/images/kept")
        return found.status_code == 200 and found.json()["pinned"] and found.json()["aliases"] == ["kept"]

    assert eventually(lambda: scene.second.get(f"/v1/images/{image}").json().get("pinned"))
    for http in (scene.second, scene.first):
        assert eventually(lambda http=http: whole(http))


@pytest.mark.parametrize("door", [upload, chat])
def test_a_store_that_can_be_written_and_not_read_loses_no_pin_and_no_name(
    scene: Scene, image_file: ImageFile, door: Callable[[httpx2.Client, bytes], httpx2.Response]
) -> None:
    data = image_file()
    image = upload(scene.first, data, pinned="true", alias="named").json()["id"]
    scene.proxy.set("gets")
    assert door(scene.second, data).status_code in (200, 201)
    assert refused(scene.second.get("/v1/images/named"))
    with scene.valkey.client() as client:
        stored = [key for key in client.keys("lookonce:images:*") if file_key(parse_id(image)).hex() in key.decode()]
    assert stored == [], "the file of a pinned image became one that can be evicted"
    scene.proxy.set("none")
    for http in (scene.second, scene.first):
        assert eventually(lambda http=http: store_in_use(http))
        found = http.get("/v1/images/named").json()
        assert (found["id"], found["pinned"], found["aliases"]) == (image, True, ["named"])


def test_a_late_write_of_an_older_record_undoes_nothing(scene: Scene, image_file: ImageFile) -> None:
    """A server that hung may carry out a write long after it was given up and another one confirmed."""
    data = image_file()
    image = upload(scene.first, data).json()["id"]
    scene.first.delete(f"/v1/images/{image}")
    key = "lookonce:images:" + (b"record:" + parse_id(image)).hex()
    with scene.valkey.client() as client:
        tombstone = client.get(key)
        assert upload(scene.first, data, alias="anew").status_code in (200, 201)
        client.set(key, tombstone)
        time.sleep(CONFIRMED)
        for http in (scene.first, scene.second):
            assert http.get("/v1/images/anew").json()["id"] == image
        assert client.get(key) != tombstone
