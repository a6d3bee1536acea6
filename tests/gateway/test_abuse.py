"""Clients that send too much, too slowly, or nothing; that read nothing; or that are pages of other sites. One gateway
with small limits; whatever is done to it, its health is asked for and answered meanwhile."""

from __future__ import annotations

import base64
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx2
import pytest

from tests.gateway.conftest import Services
from tests.gateway.processes import GatewayProcess

ImageFile = Callable[..., bytes]
PLACES, CONNECTIONS, PIPELINED = 4, 60, 4
CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def narrow(services: Services, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    with GatewayProcess(
        *services.arguments(),
        *("--max-concurrency", str(PLACES), "--max-connections", str(CONNECTIONS), "--max-pipelined", str(PIPELINED)),
        *("--header-timeout", "2", "--body-timeout", "2", "--send-timeout", "2", "--max-header-bytes", "4096"),
        *("--allowed-hosts", "eyes.example, .inside.example", "--cors-origins", "https://app.example"),
        *("--data-dir", str(tmp_path_factory.mktemp("data"))),
    ) as process:
        yield process


@pytest.fixture
def http(narrow: GatewayProcess) -> Iterator[httpx2.Client]:
    with narrow.client() as client:
        yield client


def connect(process: GatewayProcess, sent: bytes = b"") -> socket.socket:
    host, port = process.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    connection.sendall(sent)
    return connection


def everything(connection: socket.socket) -> bytes:
    """What comes until the other side ends."""
    received = b""
    with connection:
        try:
            while data := connection.recv(65536):
                received += data
        except ConnectionResetError:
            pass
    return received


def error_of(answer: bytes) -> dict[str, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"x-request-id: req_" in head and b"connection: close" in head
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error | {"status": head.split()[1].decode()}


def memory(process: GatewayProcess) -> int:
    """Resident MiB."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.process.pid}/status").read_text())
    return int(found[1]) // 1024 if found else 0


def metric(http: httpx2.Client, name: str) -> float:
    return sum(
        float(line.rsplit(" ", 1)[1]) for line in http.get("/metrics").text.splitlines() if line.startswith(name)
    )


@contextmanager
def healthy_meanwhile(process: GatewayProcess, seconds: float = 3.0) -> Iterator[None]:
    """Health is answered all the time; `seconds` is generous, as the machine may be busy."""
    over, slowest = threading.Event(), [0.0]

    def ask() -> None:
        with process.client() as client:
            while not over.is_set():
                began = time.monotonic()
                assert client.get("/healthz").status_code == 200
                slowest[0] = max(slowest[0], time.monotonic() - began)
                time.sleep(0.01)
            slowest.append(1)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield
    finally:
        over.set()
        asking.join()
    assert len(slowest) == 2 and slowest[0] < seconds


def fields(count: int, start: int = 0) -> bytes:
    return b",".join(b'"k%d":1' % number for number in range(start, start + count))


HOSTILE = {
    "fields": (b"{" + fields(1_000_000) + b"}", "256 fields in one object (the gateway's --max-json-keys)"),
    "objects": (
        b'{"messages":[' + b",".join(b"{%b}" % fields(250, 250 * at) for at in range(1000)) + b"]}",
        "100000 values (the gateway's --max-json-items)",
    ),
    "faults": (b'{"messages":[' + b",".join([b'{"role":"user","x":1}'] * 30_000) + b"]}", "unknown field"),
    "depth": (b'{"a":' * 1_000_000, "--max-json-depth"),
    "lists": (b"[" * 30_000_000, "--max-json-depth"),
    "number": (b'{"seed":' + b"9" * 30_000_000 + b"}", "64 characters in a number (the gateway's --max-json-number)"),
    "blanks": (b" " * 30_000_000, "bytes beside images and long texts"),
    "quotes": (b'{"a":"' + b'\\"' * 15_000_000 + b'"}', "1000000 quotes in texts"),
    "text": (b'{"user":"' + b"a" * 30_000_000 + b'"}', "'user' has more than 1000000 characters"),
    "escapes": (b'{"user":"' + b"\\u4e2d" * 1_500_000 + b'"}', "'user' has more than 1000000 characters"),
    "name": (b'{"' + b"a" * 1_000_000 + b'":1}', "a field's name in the request body is too long"),
    "surrogate": (b'{"user":"\\ud800"}', "the request body is not valid JSON (line 1"),
    "repeated": (b"{" + b'"n":1,' * 300 + b'"n":1}', "256 fields in one object"),
}


@pytest.mark.parametrize("shape", HOSTILE)
def test_no_shape_of_json_stops_the_gateway(narrow: GatewayProcess, http: httpx2.Client, shape: str) -> None:
    body, text = HOSTILE[shape]
    with healthy_meanwhile(narrow):
        response = http.post(CHAT, content=body, headers=JSON)
    assert response.status_code == 400 and text in response.json()["error"]["message"], response.text
    assert memory(narrow) < 600


def test_hostile_bodies_at_once_stay_within_the_memory_for_bodies(narrow: GatewayProcess) -> None:
    statuses: list[int] = []

    def send() -> None:
        with narrow.client() as client:
            statuses.append(client.post(CHAT, content=HOSTILE["text"][0], headers=JSON).status_code)

    threads = [threading.Thread(target=send) for _ in range(12)]
    with healthy_meanwhile(narrow):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert set(statuses) <= {400, 429} and 400 in statuses
    assert memory(narrow) < 1024


def test_large_images_come_in_any_form(narrow: GatewayProcess, http: httpx2.Client, image_file: ImageFile) -> None:
    data = image_file() + bytes(4_000_000)  # what follows a PNG is the file's, too
    encoded = base64.b64encode(data).decode()
    with healthy_meanwhile(narrow):
        form = http.post("/v1/images", files={"file": data})
        plain = http.post("/v1/images", json={"data": encoded})
        slashes = json.dumps({"data": f"data:image/png;base64,{encoded}"}).replace("/", "\\/")
        escaped = http.post("/v1/images", content=slashes, headers=JSON)
        parts = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}]
        chat = http.post(CHAT, json={"messages": [{"role": "user", "content": parts}], "max_tokens": 1})
    assert {response.status_code for response in (form, plain, escaped, chat)} == {200}, chat.text
    assert len({response.json()["id"] for response in (form, plain, escaped)}) == 1
    assert chat.json()["receipt"]["embedding"] == "hit"
    for wrong in (encoded[:-4] + "====", encoded[:100] + "=" + encoded[101:], "é" + encoded[1:], encoded[:-1]):
        response = http.post("/v1/images", json={"data": wrong})
        assert response.status_code == 400 and response.json()["error"]["message"] == "'data' is not valid base64"
    text = http.post(CHAT, json={"messages": [{"role": "user", "content": encoded}]})
    assert "'content' has more than 1000000 characters" in text.json()["error"]["message"]


def test_long_texts_arrive_as_they_were_sent(http: httpx2.Client) -> None:
    """Told by the count of characters."""
    counts = []
    for text in ("word " * 20_000, "word\n" * 20_000, "word\\" * 20_000):
        response = http.post(CHAT, json={"messages": [{"role": "user", "content": text}], "max_tokens": 1})
        assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded"
        counts.append(response.json()["error"]["message"])
    assert len(set(counts)) == 1 and "the text has 100000 characters" in counts[0], counts


def test_multipart_bodies_are_bounded_too(narrow: GatewayProcess, http: httpx2.Client) -> None:
    part = b'--x\r\ncontent-disposition: form-data; name="a"'
    headers = {"content-type": "multipart/form-data; boundary=x"}
    with healthy_meanwhile(narrow):
        for body in (
            (part + b"\r\n\r\n1\r\n") * 200_000 + b"--x--\r\n",
            part + b"; x=" + b"a" * 20_000_000 + b"\r\n\r\n1\r\n--x--\r\n",
            b"--x\r\n" + b"a: b\r\n" * 1_000_000 + b"\r\n1\r\n--x--\r\n",
        ):
            response = http.post("/v1/images", content=body, headers=headers)
            assert response.status_code == 400 and response.json()["error"]["code"] == "invalid_request"
    assert memory(narrow) < 600


def test_a_batch_line_of_a_hostile_shape_is_refused(narrow: GatewayProcess, http: httpx2.Client) -> None:
    line = b'{"custom_id":"a","method":"POST","url":"%b","body":{%b}}\n' % (CHAT.encode(), fields(300_000))
    with healthy_meanwhile(narrow):
        file = http.post("/v1/files", files={"file": line}, data={"purpose": "batch"}).json()["id"]
        body = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
        batch = http.post("/v1/batches", json=body).json()
        while batch["status"] in ("validating", "in_progress"):
            time.sleep(0.05)
            batch = http.get(f"/v1/batches/{batch['id']}").json()
    assert batch["status"] == "failed"
    assert "the line has more than 256 fields in one object" in batch["errors"]["data"][0]["message"]


def test_stalled_connections_take_no_places_and_end(narrow: GatewayProcess, http: httpx2.Client) -> None:
    head = b"POST %b HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n"
    with ExitStack() as stack:
        bodies = [stack.enter_context(connect(narrow, head % CHAT.encode() + b"{")) for _ in range(CONNECTIONS // 3)]
        heads = [stack.enter_context(connect(narrow, b"G")) for _ in range(CONNECTIONS // 3)]
        silent = [stack.enter_context(connect(narrow)) for _ in range(CONNECTIONS // 6)]
        with narrow.client() as fresh:
            assert fresh.get("/healthz").status_code == 200
            assert metric(fresh, "lookonce_gateway_in_flight") == 0
            assert fresh.get("/v1/models").status_code == 200
        errors = [error_of(everything(connection)) for connection in (*bodies, *heads)]
        assert {error["status"] for error in errors} == {"408"}
        assert {error["code"] for error in errors} == {"request_timeout"}
        assert "--body-timeout" in errors[0]["message"] and "--header-timeout" in errors[-1]["message"]
        assert {everything(connection) for connection in silent} == {b""}


def test_more_connections_than_there_may_be_end_those_that_were_silent_for_longest(narrow: GatewayProcess) -> None:
    with ExitStack() as stack:
        first = stack.enter_context(connect(narrow, b"G"))
        for _ in range(3 * CONNECTIONS):
            stack.enter_context(connect(narrow, b"G"))
        with narrow.client() as fresh:
            assert fresh.get("/healthz").status_code == 200
            assert metric(fresh, "lookonce_gateway_connections ") <= CONNECTIONS + 1
            assert metric(fresh, 'lookonce_gateway_connections_ended_total{reason="crowded"}') >= CONNECTIONS
        assert everything(first) == b""


def test_bytes_that_drip_are_no_way_around_the_time_for_headers(narrow: GatewayProcess) -> None:
    connection, began = connect(narrow, b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n"), time.monotonic()
    received = b""
    while b'"ok"' not in received:
        received += connection.recv(65536)
    with connection:
        connection.settimeout(0.1)
        while time.monotonic() - began < 60:
            try:
                connection.sendall(b"\r\n")  # allowed before a request
                if not connection.recv(1):
                    return
            except TimeoutError:
                continue
            except OSError:
                return
    raise AssertionError("the connection is still open")


def test_requests_sent_ahead_are_few_and_their_answers_must_be_read(
    narrow: GatewayProcess, http: httpx2.Client
) -> None:
    request = b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n"
    before = memory(narrow)
    answers = everything(connect(narrow, request * 5000))
    assert 1 <= answers.count(b"HTTP/1.1 200 OK") <= PIPELINED + 1
    health = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n"
    with connect(narrow, health * PIPELINED) as few:
        received = b""
        while received.count(b'"ok"') < PIPELINED:
            received += few.recv(65536)
    file = http.post("/v1/files", files={"file": b"0" * 20_000_000}, data={"purpose": "batch"}).json()["id"]
    request = f"GET /v1/files/{file}/content HTTP/1.1\r\nhost: localhost\r\n\r\n".encode()
    unread = 'lookonce_gateway_connections_ended_total{reason="unread"}'
    with ExitStack() as stack:
        for _ in range(PLACES):
            connection = stack.enter_context(connect(narrow))
            connection.sendall(request * PIPELINED)
        deadline = time.monotonic() + 60
        while metric(http, unread) < PLACES and time.monotonic() < deadline:
            time.sleep(0.1)
        assert metric(http, unread) == PLACES
    assert metric(http, "lookonce_gateway_in_flight") == 0
    assert memory(narrow) < before + 150


def test_who_leaves_with_requests_sent_ahead_is_worked_for_no_more(narrow: GatewayProcess, http: httpx2.Client) -> None:
    body = {"messages": [{"role": "user", "content": "Go on."}], "max_tokens": 8000, "ignore_eos": True, "stream": True}
    sent = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    request = f"{head}content-length: {len(sent)}\r\n\r\n".encode() + sent
    before = metric(http, "lookonce_gateway_disconnects_total")
    with connect(narrow, request + request) as connection:
        assert connection.recv(65536)
        assert metric(http, "lookonce_gateway_in_flight") == 1
    deadline = time.monotonic() + 30
    while metric(http, "lookonce_gateway_in_flight") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert metric(http, "lookonce_gateway_in_flight") == 0
    assert metric(http, "lookonce_gateway_disconnects_total") == before + 1


def test_what_is_no_http_or_too_long_has_the_one_shape(narrow: GatewayProcess) -> None:
    for sent, status in (
        (b"nonsense\r\n\r\n", "400"),
        (b"GET / HTTP/9.9\r\n\r\n", "400"),
        (b"GET /\xff HTTP/1.1\r\nhost: localhost\r\n\r\n", "400"),
        (b"POST / HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nnonsense\r\n", "400"),
        (b"GET / HTTP/1.1\r\nhost: localhost\r\na: " + b"b" * 5000 + b"\r\n\r\n", "431"),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 5000 + b"\r\n", "431"),
        (b"GET /?" + b"a" * 5000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n", "431"),
    ):
        error = error_of(everything(connect(narrow, sent)))
        assert error["status"] == status and error["type"] == "invalid_request_error", (sent[:40], error)


def test_who_leaves_in_mid_body_is_no_error_of_the_server(narrow: GatewayProcess, http: httpx2.Client) -> None:
    for path, kind in ((CHAT, "application/json"), ("/v1/images", "multipart/form-data; boundary=x")):
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {kind}\r\ncontent-length: 99\r\n"
        connect(narrow, f"{head}x-request-id: gone-{path[-3:]}\r\n\r\n--x".encode()).close()
        assert narrow.line("request", request_id=f"gone-{path[-3:]}")["status"] == 499
    assert "Traceback" not in narrow.log and 'status="500"' not in http.get("/metrics").text


def test_bodies_must_say_that_they_are_json(http: httpx2.Client, image_file: ImageFile) -> None:
    image = http.post("/v1/images", files={"file": image_file()}).json()["id"]
    routes = (("POST", CHAT), ("POST", "/v1/images"), ("POST", f"/v1/images/{image}/questions"))
    others = (("PATCH", f"/v1/images/{image}"), ("POST", "/v1/moderations"), ("POST", "/v1/batches"))
    for method, path in (*routes, *others):
        for headers in ({}, {"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"}):
            response = http.request(method, path, content=b"{}", headers=headers)
            assert response.status_code == 415 and "application/json" in response.json()["error"]["message"]
        charset = http.request(method, path, content=b"{", headers={"content-type": "application/json; charset=utf-8"})
        assert "not valid JSON" in charset.json()["error"]["message"]
    packed = http.post(CHAT, content=b"{}", headers=JSON | {"content-encoding": "gzip"})
    assert packed.status_code == 415 and packed.json()["error"]["param"] == "content-encoding"
    assert http.post(CHAT, content=b"{}", headers=JSON | {"content-encoding": "identity"}).status_code == 400


def test_only_this_servers_names_are_answered_to(http: httpx2.Client) -> None:
    ours = ("localhost", "LOCALHOST:8000", "127.0.0.1:9", "[::1]:80", "a.localhost", "eyes.example", "b.inside.example")
    for host in ours:
        assert http.get("/v1/models", headers={"host": host}).status_code == 200, host
    for host in ("evil.example", "10.0.0.7:8000", "localhost.evil.example", "inside.example", "x@y", "[::1", ""):
        for method, path in (("GET", "/v1/images"), ("POST", CHAT), ("GET", "/"), ("GET", "/metrics"), ("PUT", "/x")):
            response = http.request(method, path, headers={"host": host})
            assert response.status_code == 403, (host, path)
            assert "--allowed-hosts" in response.json()["error"]["message"]
        for path in ("/healthz", "/readyz"):  # probes ask by the address
            assert http.get(path, headers={"host": host}).status_code == 200


def test_pages_of_other_sites_neither_read_nor_change(http: httpx2.Client, narrow: GatewayProcess) -> None:
    own, app = narrow.url, "https://app.example"
    for headers in ({"origin": own}, {"origin": app}, {"sec-fetch-site": "same-origin"}, {"sec-fetch-site": "none"}):
        assert http.get("/v1/models", headers=headers).status_code == 200, headers
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert http.get("/", headers=link).status_code == 200
    for headers in (
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": own.replace("127.0.0.1", "localhost")},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
        {"sec-fetch-site": "same-site", "sec-fetch-mode": "cors"},
    ):
        for method, path in (("GET", "/v1/images"), ("POST", "/v1/images"), ("DELETE", "/v1/images/img_a")):
            response = http.request(method, path, headers=headers)
            assert response.status_code == 403, (headers, method)
            assert "--cors-origins" in response.json()["error"]["message"]
    assert http.post("/v1/images", headers=link).status_code == 403
    asking = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    assert http.options("/v1/images", headers={"origin": app, **asking}).status_code == 200
    assert http.options("/v1/images", headers={"origin": "https://evil.example", **asking}).status_code == 403


def test_routes_that_do_not_exist_are_not_found(http: httpx2.Client) -> None:
    for method, path in (("POST", "/v1/models/some"), ("PUT", "/v1/images/generations"), ("POST", "/playground/x")):
        response = http.request(method, path, json={})
        assert response.status_code == 404 and response.json()["error"]["code"] == "not_found", path
    for method, path in (("PUT", "/v1/images"), ("PUT", "/v1/images/img_a"), ("GET", CHAT)):
        response = http.request(method, path)
        assert response.status_code == 405 and response.json()["error"]["code"] == "method_not_allowed"
