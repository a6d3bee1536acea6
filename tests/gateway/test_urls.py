"""Images at URLs, through the real gateway process: fetched from servers on loopback that stand for the internet."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import httpx2
import pytest

from tests.fetching.servers import Canary, ImageServer, answer, make_certificates, redirect
from tests.gateway.conftest import Services
from tests.gateway.processes import MODEL, GatewayProcess

NAMES = {
    "images.example": [["127.0.0.2"]],
    "rebind.example": [["127.0.0.2"], ["127.0.0.1"]],
    "in.example": [["127.0.0.1"]],
}
NAME_SERVER = """
import json, os, socket
table, real = json.loads(os.environ["TEST_NAMES"]), socket.getaddrinfo
def getaddrinfo(host, port, *args, **options):
    if host not in table:
        return real(host, port, *args, **options)
    answers = table[host].pop(0) if len(table[host]) > 1 else table[host][0]
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answers]
socket.getaddrinfo = getaddrinfo
"""


@dataclass
class World:
    """A gateway that may fetch from 127.0.0.2 alone, servers there, and a canary everywhere else."""

    gateway: GatewayProcess
    plain: ImageServer
    secure: ImageServer
    canary: Canary

    def upload(self, url: str) -> httpx2.Response:
        with self.gateway.client() as http:
            return http.post("/v1/images", json={"url": url})

    def chat(self, *urls: str) -> httpx2.Response:
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}]
        with self.gateway.client() as http:
            body = {"model": MODEL, "messages": messages, "max_tokens": 2, "temperature": 0}
            return http.post("/v1/chat/completions", json=body)


@pytest.fixture(scope="module")
def world(services: Services, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("names")
    (directory / "sitecustomize.py").write_text(NAME_SERVER)
    certificates = make_certificates(directory, "images.example")
    with (
        Canary() as canary,
        ImageServer(host="127.0.0.2") as plain,
        ImageServer(host="127.0.0.2", certificates=certificates) as secure,
    ):
        ports = ",".join(str(server.port) for server in (canary, plain, secure))
        arguments = [
            "--fetch-ports",
            ports,
            "--fetch-allow-networks",
            "127.0.0.2/32",
            "--fetch-ca",
            str(certificates.ca),
        ]
        arguments += ["--max-urls", "4", "--max-image-bytes", "64KiB", "--max-request-image-bytes", "96KiB"]
        path = os.pathsep.join(filter(None, [str(directory), os.environ.get("PYTHONPATH")]))
        env = {"PYTHONPATH": path, "TEST_NAMES": json.dumps(NAMES), "HTTP_PROXY": f"http://127.0.0.1:{canary.port}"}
        with GatewayProcess(*services.arguments(), *arguments, env=env) as gateway:
            yield World(gateway, plain, secure, canary)


def test_an_upload_by_url_is_the_same_image(world: World, image_file: Callable[..., bytes]) -> None:
    file = image_file()
    world.secure.routes["/a.png"] = answer(file)
    response = world.upload(f"https://images.example:{world.secure.port}/a.png")
    assert response.status_code == 200, response.text
    with world.gateway.client() as http:
        direct = http.post("/v1/images", files={"file": ("a.png", file, "image/png")}).json()
    assert response.json()["id"] == direct["id"] and direct["cached"]
    assert world.secure.server_names[-1] == "images.example"
    assert world.secure.requests[-1].headers["host"] == f"images.example:{world.secure.port}"


def test_chat_with_images_at_urls(world: World, image_file: Callable[..., bytes]) -> None:
    world.plain.routes |= {"/go": redirect("/b.png"), "/b.png": answer(image_file())}
    world.secure.routes["/c.png"] = answer(image_file())
    urls = f"{world.plain.url}/go", f"https://images.example:{world.secure.port}/c.png", f"{world.plain.url}/b.png"
    response = world.chat(*urls)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["message"]["content"] is not None


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/", "http://2130706433:{port}/", "http://0x7f000001:{port}/", "http://0177.0.0.1:{port}/",
        "http://127.1:{port}/", "http://[::1]:{port}/", "http://[::ffff:127.0.0.1]:{port}/", "http://localhost:{port}/",
        "http://127.0.0.2@127.0.0.1:{port}/", "http://127.0.0.1:{port}\\@127.0.0.2/", "http://in.example:{port}/",
        "http://0.0.0.0:{port}/", "http://127.0.0.1%00:{port}/", "http://[::]:{port}/", "http://[64:ff9b::7f00:1]:{port}/",
        "http://{plain}/inside", "http://{plain}/inside-by-name", "http://169.254.169.254/latest/meta-data/",
    ],
)  # fmt: skip
def test_hostile_urls_reach_nothing(world: World, url: str) -> None:
    port = world.canary.port
    world.plain.routes["/inside"] = redirect(f"http://127.0.0.1:{port}/")
    world.plain.routes["/inside-by-name"] = redirect(f"http://in.example:{port}/")
    url = url.replace("{port}", str(port)).replace("{plain}", f"127.0.0.2:{world.plain.port}")
    for response, param in ((world.upload(url), "url"), (world.chat(url), "messages.0.content.0.image_url.url")):
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["code"], error["param"]) == ("invalid_image_url", param)
        assert "127" not in error["message"] and "169" not in error["message"]
    assert world.canary.connections == 0


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "gopher://127.0.0.1:{port}/_x", "ftp://127.0.0.1:{port}/", " http://x"]
)
def test_other_schemes_reach_nothing(world: World, url: str) -> None:
    url = url.replace("{port}", str(world.canary.port))
    assert {world.upload(url).status_code, world.chat(url).status_code} == {400}
    assert world.canary.connections == 0


def test_a_name_that_moves_inside_is_followed_nowhere(world: World, image_file: Callable[..., bytes]) -> None:
    world.plain.routes["/d.png"] = answer(image_file())
    assert world.upload(f"http://rebind.example:{world.plain.port}/d.png").status_code == 200
    response = world.upload(f"http://rebind.example:{world.canary.port}/d.png")
    assert response.json()["error"]["message"] == "the host of 'url' has no public address"
    assert world.canary.connections == 0


def test_too_many_urls_are_counted_before_any_is_fetched(world: World) -> None:
    before = world.plain.connections
    response = world.chat(*(f"{world.plain.url}/{number}.png" for number in range(5)))
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "messages") and "limit is 4" in error["message"]
    assert world.plain.connections == before


def test_one_hostile_url_stops_the_others(world: World) -> None:
    before = world.plain.connections
    response = world.chat(f"{world.plain.url}/b.png", "http://127.1/")
    assert response.json()["error"]["param"] == "messages.0.content.1.image_url.url"
    assert world.plain.connections == before


def test_bytes_are_bounded_for_each_and_together(world: World) -> None:
    world.plain.routes |= {f"/{n}.bin": answer(bytes(40 << 10)) for n in range(3)} | {"/large": answer(bytes(65 << 10))}
    large = world.upload(f"{world.plain.url}/large").json()["error"]
    assert (large["code"], large["message"]) == ("image_too_large", "the image at 'url' has more than 64.0 KiB")
    together = world.chat(*(f"{world.plain.url}/{n}.bin" for n in range(3))).json()["error"]
    assert together["code"] == "image_too_large" and "96.0 KiB" in together["message"]


@pytest.mark.parametrize(("file", "code"), [(b"no image", "invalid_image"), (b"", "invalid_image_url")])
def test_what_is_fetched_is_decoded_as_strictly_as_a_file(world: World, file: bytes, code: str) -> None:
    world.plain.routes["/e.png"] = answer(file)
    for response in (world.upload(f"{world.plain.url}/e.png"), world.chat(f"{world.plain.url}/e.png")):
        assert (response.status_code, response.json()["error"]["code"]) == (400, code)


def test_fetching_can_be_switched_off() -> None:
    with (
        ImageServer() as server,
        GatewayProcess("--fetch-urls", "off", "--fetch-allow-networks", "127.0.0.0/8") as gateway,
    ):
        with gateway.client() as http:
            response = http.post("/v1/images", json={"url": f"{server.url}/a.png"})
        assert response.status_code == 400 and "switched off" in response.json()["error"]["message"]
        assert server.connections == 0
