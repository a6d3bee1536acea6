"""Keys, tenants, limits, request ids, failover, drain: one gateway with everything switched on."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import httpx2
import pytest

from tests.gateway.conftest import Services
from tests.gateway.processes import GatewayProcess

ImageFile = Callable[..., bytes]
RED, BLUE = "red-0123456789abcdef", "blue-0123456789abcdef"
LIMIT = 200_000
JSON = {"content-type": "application/json"}
ASK = {"questions": ["What?"], "max_tokens": 2}
LONG = {"messages": [{"role": "user", "content": "Go on."}], "max_tokens": 300, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def door(services: Services, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    nowhere = f"unix:{tmp_path_factory.mktemp('nowhere')}/none.sock"
    with GatewayProcess(
        *("--vision", f"{nowhere},{services.vision.address}", "--lm", f"{nowhere},{services.language.address}"),
        *("--model-name", "first, second", "--max-body-bytes", str(LIMIT), "--max-concurrency", "2"),
        *("--cors-origins", "https://app.example", "--tenant-concurrency", "0"),
        env={"LOOKONCE_GATEWAY_API_KEYS": f"red={RED},blue={BLUE}", "LOOKONCE_GATEWAY_SECRET": "a secret"},
    ) as process:
        yield process


@pytest.fixture
def red(door: GatewayProcess) -> Iterator[httpx2.Client]:
    with door.client(RED) as client:
        yield client


@pytest.fixture
def blue(door: GatewayProcess) -> Iterator[httpx2.Client]:
    with door.client(BLUE) as client:
        yield client


def test_every_route_but_health_needs_a_key(door: GatewayProcess) -> None:
    with door.client() as nobody, door.client("wrong-0123456789abcdef") as stranger:
        for client in (nobody, stranger):
            for method, path in (
                ("POST", "/v1/images"),
                ("GET", "/v1/models"),
                ("GET", "/metrics"),
                ("GET", "/openapi.json"),
                ("GET", "/nowhere"),
                ("POST", "/v1/chat/completions"),
            ):
                response = client.request(method, path)
                assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
        assert {nobody.get(path).status_code for path in ("/healthz", "/readyz", "/health")} == {200}
        assert nobody.get("/version").status_code == 401


def test_a_key_comes_in_any_of_three_headers(door: GatewayProcess) -> None:
    with door.client() as http:
        for name, value in (("authorization", f"Bearer {RED}"), ("x-api-key", RED), ("api-key", RED)):
            assert http.get("/version", headers={name: value}).status_code == 200
            assert http.get("/version", headers={name: value + "x"}).status_code == 401


def test_several_names_mean_the_one_model(red: httpx2.Client) -> None:
    assert [model["id"] for model in red.get("/v1/models").json()["data"]] == ["first", "second"]
    for name in ("first", "second", "lookonce"):
        assert red.get(f"/v1/models/{name}").json()["id"] == name
        body = {"model": name, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
        answer = red.post("/v1/chat/completions", json=body).json()
        assert (answer["model"], answer["receipt"]["model"]) == (name, "first")
    for response in (red.get("/v1/models/third"), red.post("/v1/chat/completions", json=body | {"model": "third"})):
        assert response.status_code == 404 and "'first' or 'second'" in response.json()["error"]["message"]


def test_tenants_share_nothing(
    red: httpx2.Client, blue: httpx2.Client, services: Services, image_file: ImageFile
) -> None:
    data, before = image_file(), services.encodes()
    mine = red.post("/v1/images", files={"file": data}).json()
    theirs = blue.post("/v1/images", files={"file": data}).json()
    assert mine["id"] != theirs["id"]
    assert theirs["cached"] is False and services.encodes() == before + 2
    for response in (
        blue.get(f"/v1/images/{mine['id']}"),
        blue.delete(f"/v1/images/{mine['id']}"),
        blue.post(f"/v1/images/{mine['id']}/questions", json=ASK),
    ):
        assert response.status_code == 404
    content = [{"type": "image_url", "image_url": {"url": f"lookonce:{mine['id']}"}}]
    stolen = blue.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": content}]})
    assert stolen.status_code == 404
    assert red.post(f"/v1/images/{mine['id']}/questions", json=ASK).status_code == 200  # a dead replica is passed over
    assert red.delete(f"/v1/images/{mine['id']}").status_code == 200
    assert blue.get(f"/v1/images/{theirs['id']}").status_code == 200


def test_bodies_over_the_limit_are_refused_declared_or_not(red: httpx2.Client) -> None:
    body = b'{"data": "' + b"A" * LIMIT + b'"}'
    declared = red.post("/v1/images", content=body, headers={"content-type": "application/json"})
    chunked = red.post("/v1/images", content=iter([body]), headers={"content-type": "application/json"})
    form = red.post("/v1/images", files={"file": bytes(LIMIT)})
    for response in (declared, chunked, form):
        assert response.status_code == 413 and response.json()["error"]["code"] == "payload_too_large"


def test_request_ids_are_echoed_when_sane(red: httpx2.Client) -> None:
    assert red.get("/v1/models", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    made = red.get("/nowhere", headers={"x-request-id": "../ bad\tid"})
    assert made.headers["x-request-id"].startswith("req_") and made.status_code == 404


def test_a_full_gateway_says_so_at_once(red: httpx2.Client, services: Services, image_file: ImageFile) -> None:
    image = red.post("/v1/images", files={"file": image_file()}).json()["id"]
    path, body = f"/v1/images/{image}/questions", ASK | {"stream": True}
    with ExitStack() as stack:
        with services.language.frozen():
            streams = [stack.enter_context(red.stream("POST", path, json=body)) for _ in range(2)]
            full = red.get("/v1/models")
            assert full.status_code == 429 and full.headers["retry-after"] == "1"
            assert full.json()["error"]["code"] == "overloaded" and full.headers["x-request-id"]
            assert red.get("/healthz").status_code == 200
        assert [list(stream.iter_lines())[-2] for stream in streams] == ["data: [DONE]"] * 2
        assert red.get("/v1/models").status_code == 200  # whoever has the last byte finds the place free


def test_cors_only_for_configured_origins(door: GatewayProcess) -> None:
    preflight = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    with door.client() as http:
        allowed = http.options("/v1/images", headers={"origin": "https://app.example", **preflight})
        refused = http.options("/v1/images", headers={"origin": "https://evil.example", **preflight})
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    assert "access-control-allow-origin" not in refused.headers


def test_wrong_methods_and_bodies_have_the_one_shape(red: httpx2.Client) -> None:
    for response, status in (
        (red.put("/v1/images"), 405),
        (red.post("/v1/chat/completions", content=b"{not json", headers=JSON), 400),
        (red.post("/v1/chat/completions", content=b"[1]", headers=JSON), 400),
        (red.post("/v1/chat/completions", content=b"[" * 5000, headers=JSON), 400),
        (red.post("/v1/chat/completions", content=b"{}"), 415),
        (red.post("/v1/images", content=b"--x", headers={"content-type": "multipart/form-data; boundary=y"}), 400),
        (red.post("/v1/images", content=b"", headers={"content-type": "multipart/form-data"}), 400),
    ):
        assert response.status_code == status, response.text
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_metrics_and_log_name_routes_never_paths(
    red: httpx2.Client, door: GatewayProcess, image_file: ImageFile
) -> None:
    identifier = red.post("/v1/images", files={"file": image_file()}).json()["id"]
    secret = {"questions": ["a secret question"], "max_tokens": 1}
    red.post(f"/v1/images/{identifier}/questions", json=secret, headers={"x-request-id": "secret-1"})
    text = red.get("/metrics").text
    assert 'route="/v1/images/{image_id}/questions"' in text and identifier not in text
    last = door.line("request", request_id="secret-1")
    assert last["route"] == "/v1/images/{image_id}/questions"
    assert (last["method"], last["status"], last["tenant"]) == ("POST", 200, "red") and last["ms"] > 0
    assert "a secret question" not in door.log and RED not in door.log


def test_sigterm_lets_a_stream_finish_and_exits_0(services: Services) -> None:
    with GatewayProcess(*services.arguments()) as process, process.client() as http:
        with http.stream("POST", "/v1/chat/completions", json=LONG) as response:
            lines = response.iter_lines()
            assert next(lines)
            status: list[int] = []
            stopping = threading.Thread(target=lambda: status.append(process.terminate()))
            stopping.start()
            assert [line for line in lines if line][-1] == "data: [DONE]"
        stopping.join()
    assert status == [0]


def test_what_outlasts_the_grace_time_is_told_to_try_again(services: Services) -> None:
    arguments = (*services.arguments(), "--drain-grace", "1")
    with GatewayProcess(*arguments) as process, process.client() as http, services.language.frozen():
        answers: list[httpx2.Response] = []
        asking = threading.Thread(
            target=lambda: answers.append(http.post("/v1/chat/completions", json={**LONG, "stream": False}))
        )
        asking.start()
        deadline = time.monotonic() + 60
        while "lookonce_gateway_in_flight 1.0" not in http.get("/metrics").text:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert process.terminate() == 0
        asking.join()
        (answer,) = answers
        assert answer.status_code == 503 and float(answer.headers["retry-after"]) > 0
        assert answer.json()["error"]["code"] == "unavailable"
        assert process.line("request", request_id=answer.headers["x-request-id"])["status"] == 503
        for line in process.log.splitlines():  # the libraries' lines, too
            assert json.loads(line)["service"] == "gateway"
