"""How images are kept: lists, lifetimes, pins, names; two tenants on every route; what outlives a restart."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest

from tests.gateway.conftest import Services
from tests.gateway.processes import GatewayProcess

ImageFile = Callable[..., bytes]
RED, BLUE = "red-0123456789abcdef", "blue-0123456789abcdef"
KEYS = {"LOOKONCE_GATEWAY_API_KEYS": f"red={RED},blue={BLUE}", "LOOKONCE_GATEWAY_SECRET": "a secret"}
ASK = {"questions": ["What?"], "max_tokens": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def arguments(services: Services, folder: Path) -> list[str]:
    return [*services.arguments(), "--store", f"file://{folder}", "--max-image-ttl", "10d", "--image-ttl", "1d"]


@pytest.fixture(scope="module")
def kept(arguments: list[str]) -> Iterator[GatewayProcess]:
    with GatewayProcess(*arguments, env=KEYS) as process:
        yield process


@pytest.fixture
def red(kept: GatewayProcess) -> Iterator[httpx2.Client]:
    with kept.client(RED) as client:
        for image in client.get("/v1/images?limit=100").json()["data"]:
            client.delete(f"/v1/images/{image['id']}")
        yield client


@pytest.fixture
def blue(kept: GatewayProcess) -> Iterator[httpx2.Client]:
    with kept.client(BLUE) as client:
        yield client


def upload(http: httpx2.Client, data: bytes, **fields: str) -> dict:
    response = http.post("/v1/images", files={"file": data}, data=fields)
    assert response.status_code == 200, response.text
    return response.json()


def ids(http: httpx2.Client, query: str = "") -> list[str]:
    return [image["id"] for image in http.get(f"/v1/images{query}").json()["data"]]


def test_pages_go_from_newest_to_oldest_and_name_every_image_once(red: httpx2.Client, image_file: ImageFile) -> None:
    assert red.get("/v1/images").json() == {
        "object": "list",
        "data": [],
        "first_id": None,
        "last_id": None,
        "has_more": False,
    }
    made = [upload(red, image_file())["id"] for _ in range(5)][::-1]
    assert ids(red) == made
    first = red.get("/v1/images?limit=2").json()
    assert [image["id"] for image in first["data"]] == made[:2] == [first["first_id"], first["last_id"]]
    assert first["has_more"] is True
    second = red.get(f"/v1/images?limit=3&after={first['last_id']}").json()
    assert [image["id"] for image in second["data"]] == made[2:] and second["has_more"] is False
    assert first["data"][0] == red.get(f"/v1/images/{made[0]}").json()
    red.delete(f"/v1/images/{made[1]}")
    assert ids(red) == [made[0], *made[2:]]


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "limit=-1", "limit=", "limit=1.0"])
def test_bad_limits_are_named(red: httpx2.Client, query: str) -> None:
    response = red.get(f"/v1/images?{query}")
    assert response.status_code == 400 and response.json()["error"]["param"] == "limit"


def test_lifetimes_and_pins_are_set_on_upload_and_afterwards(red: httpx2.Client, image_file: ImageFile) -> None:
    data = image_file()
    image = upload(red, data, ttl="3600")
    path = f"/v1/images/{image['id']}"
    assert 3500 <= image["expires_at"] - image["created_at"] <= 3700 and image["pinned"] is False
    assert 3500 <= upload(red, data)["expires_at"] - time.time() <= 3700  # the image's own, again
    pinned = red.patch(path, json={"pinned": True}).json()
    assert pinned["pinned"] is True and pinned["expires_at"] is None
    assert upload(red, data)["expires_at"] is None
    assert red.get(path).json() == pinned
    timed = red.patch(path, json={"ttl": 7200}).json()
    assert timed["pinned"] is False and 7100 <= timed["expires_at"] - time.time() <= 7300
    assert red.patch(path, json={"pinned": True, "ttl": 60}).json()["error"]["param"] == "ttl"
    assert red.patch(path, json={"ttl": 11 * 86400}).json()["error"]["message"] == (
        "'ttl' is 950400 seconds, the limit is 864000"
    )


def test_an_image_is_gone_when_its_time_is_up(red: httpx2.Client, image_file: ImageFile) -> None:
    short, long = upload(red, image_file(), ttl="1"), upload(red, image_file())
    deadline = time.monotonic() + 60
    while red.get(f"/v1/images/{short['id']}").status_code == 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert ids(red) == [long["id"]]
    ask = red.post(f"/v1/images/{short['id']}/questions", json=ASK)
    assert ask.status_code == 404 and ask.json()["error"]["code"] == "not_found"


def test_an_alias_stands_wherever_an_id_does(red: httpx2.Client, image_file: ImageFile) -> None:
    image = upload(red, image_file(), alias="front-door")
    assert image["aliases"] == ["front-door"]
    assert red.get("/v1/images/front-door").json()["id"] == image["id"]
    assert red.post("/v1/images/front-door/questions", json=ASK).json()["image"] == image["id"]
    content = [{"type": "image_url", "image_url": {"url": "lookonce:front-door"}}, {"type": "text", "text": "?"}]
    chat = {"messages": [{"role": "user", "content": content}], "max_tokens": 2}
    answer = red.post("/v1/chat/completions", json=chat)
    assert answer.status_code == 200 and answer.json()["receipt"]["embedding"] == "hit"
    assert red.patch("/v1/images/front-door", json={"alias": "door"}).json()["aliases"] == ["front-door", "door"]
    assert red.delete("/v1/images/door/aliases/front-door").json()["aliases"] == ["door"]
    assert red.get("/v1/images/front-door").status_code == 404
    assert red.delete("/v1/images/door/aliases/front-door").status_code == 404
    assert red.delete("/v1/images/door").json()["id"] == image["id"]
    assert red.get("/v1/images/door").status_code == red.get(f"/v1/images/{image['id']}").status_code == 404


def test_an_alias_moves_and_an_erased_images_alias_does_not_come_back(
    red: httpx2.Client, image_file: ImageFile
) -> None:
    data = image_file()
    old, new = upload(red, data, alias="now"), upload(red, image_file(), alias="now")
    assert red.get("/v1/images/now").json()["id"] == new["id"]
    assert red.get(f"/v1/images/{old['id']}").json()["aliases"] == []
    red.delete(f"/v1/images/{old['id']}")
    assert red.get("/v1/images/now").json()["id"] == new["id"]
    red.patch(f"/v1/images/{new['id']}", json={"alias": "then"})
    red.delete("/v1/images/then")
    assert upload(red, data)["aliases"] == []
    assert red.get("/v1/images/now").status_code == red.get("/v1/images/then").status_code == 404


@pytest.mark.parametrize("alias", ["img_x", "-a", "a/b", "..", "ä", "a b", "a\n", "a" * 64 + "b"])
def test_names_that_cannot_be_are_refused(red: httpx2.Client, image_file: ImageFile, alias: str) -> None:
    image = upload(red, image_file(28, 28))
    response = red.patch(f"/v1/images/{image['id']}", json={"alias": alias})
    assert response.status_code == 400 and response.json()["error"]["param"] == "alias"
    assert red.get(f"/v1/images/{image['id']}").json()["aliases"] == []


def test_an_image_has_at_most_sixteen_aliases(red: httpx2.Client, image_file: ImageFile) -> None:
    path = f"/v1/images/{upload(red, image_file())['id']}"
    for number in range(16):
        assert red.patch(path, json={"alias": f"name-{number}"}).status_code == 200
    assert red.patch(path, json={"alias": "one-more"}).json()["error"]["param"] == "alias"
    assert red.patch(path, json={"alias": "name-3"}).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"ttl": "x"}, "ttl"), ({"ttl": "0"}, "ttl"), ({"pinned": "yes"}, "pinned"), ({"name": "x"}, "name")],
)
def test_bad_form_fields_are_named(red: httpx2.Client, image_file: ImageFile, fields: dict, param: str) -> None:
    response = red.post("/v1/images", files={"file": image_file()}, data=fields)
    assert response.status_code == 400 and response.json()["error"]["param"] == param


def test_no_route_shows_one_tenant_what_is_anothers(
    red: httpx2.Client, blue: httpx2.Client, image_file: ImageFile
) -> None:
    data = image_file()
    mine = upload(red, data, alias="ours", pinned="true")
    content = [{"type": "text", "text": "?"}]
    for name in (mine["id"], "ours"):
        part = {"type": "image_url", "image_url": {"url": f"lookonce:{name}"}}
        chat = {"messages": [{"role": "user", "content": [part, *content]}]}
        for response in (
            blue.get(f"/v1/images/{name}"),
            blue.patch(f"/v1/images/{name}", json={"alias": "mine"}),
            blue.delete(f"/v1/images/{name}/aliases/ours"),
            blue.delete(f"/v1/images/{name}"),
            blue.post(f"/v1/images/{name}/questions", json=ASK),
            blue.post("/v1/chat/completions", json=chat),
            blue.get(f"/v1/images?after={name}"),
        ):
            assert response.status_code == 404, response.text
            assert response.json()["error"]["message"] == "no such image"
    assert mine["id"] not in ids(blue, "?limit=100")
    theirs = upload(blue, data, alias="ours")
    assert theirs["id"] != mine["id"] and theirs["cached"] is False and theirs["pinned"] is False
    assert red.get("/v1/images/ours").json()["id"] == mine["id"]
    assert blue.get("/v1/images/ours").json()["id"] == theirs["id"]
    assert blue.delete("/v1/images/ours").status_code == 200
    assert red.get("/v1/images/ours").json()["id"] == mine["id"] and ids(red) == [mine["id"]]


def test_lists_pins_and_names_outlive_a_restart_and_are_shared(
    kept: GatewayProcess, arguments: list[str], red: httpx2.Client, image_file: ImageFile
) -> None:
    images = [upload(red, image_file(), alias="named", pinned="true"), upload(red, image_file())]
    with GatewayProcess(*arguments, "--no-pinning", env=KEYS) as other, other.client(RED) as http:
        assert ids(http) == [images[1]["id"], images[0]["id"]]
        assert http.get("/v1/images/named").json()["pinned"] is True
        added = upload(http, image_file())
        assert ids(red)[0] == added["id"]
        refused = http.patch("/v1/images/named", json={"pinned": True})
        assert refused.status_code == 403 and refused.json()["error"]["param"] == "pinned"
