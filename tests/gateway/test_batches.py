"""Files and batches through OpenAI's client and over HTTP: every line exactly once, whatever happens to the process."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from gateway.batches.lanes import Lanes
from gateway.schemas.batches import BatchObject, FileObject
from tests.fetching.servers import Canary, PictureServer, answer
from tests.gateway.conftest import Services
from tests.gateway.processes import ROOT, GatewayProcess
from tests.processes import START_SECONDS

Picture = Callable[..., bytes]
RED, BLUE = "red-0123456789abcdef", "blue-0123456789abcdef"
KEYS = {"LOOKONCE_GATEWAY_API_KEYS": f"red={RED},blue={BLUE}", "LOOKONCE_GATEWAY_SECRET": "a secret"}
CHAT = "/v1/chat/completions"
ENDED = ("completed", "failed", "expired", "cancelled")


@dataclass
class World:
    """A gateway with a data directory that may fetch from 127.0.0.2 alone, a server there, a canary on 127.0.0.1."""

    gateway: GatewayProcess
    pictures: PictureServer
    canary: Canary
    data_dir: Path


@pytest.fixture(scope="module")
def world(services: Services, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    data_dir = tmp_path_factory.mktemp("batches")
    policy = data_dir / "policy.yaml"
    policy.write_text("categories: [{id: star, question: 'Is there a star?'}]")
    with Canary() as canary, PictureServer(host="127.0.0.2") as pictures:
        rules = ("--fetch-ports", f"{canary.port},{pictures.port}", "--fetch-allow-networks", "127.0.0.2/32")
        limits = ("--max-file-bytes", "64KiB", "--max-stored-bytes", "160KiB", "--max-batch-lines", "40")
        own = ("--data-dir", str(data_dir / "deep" / "data"), "--policy", str(policy), "--max-batches", "3")
        with GatewayProcess(*services.arguments(), *rules, *limits, *own, env=KEYS) as gateway:
            yield World(gateway, pictures, canary, data_dir / "deep" / "data")


@pytest.fixture
def client(world: World) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{world.gateway.url}/v1", api_key=RED, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def red(world: World) -> Iterator[httpx2.Client]:
    with world.gateway.client(RED) as client:
        yield client


@pytest.fixture
def blue(world: World) -> Iterator[httpx2.Client]:
    with world.gateway.client(BLUE) as client:
        yield client


def chat_line(name: str, *content: Any, url: str = CHAT, **options: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": list(content) or "Say it."}]
    body = {"messages": messages, "max_tokens": 3, "temperature": 0, **options}
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def jsonl(*lines: Any) -> bytes:
    return b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines) + b"\n"


def begin(http: httpx2.Client, data: bytes, endpoint: str = CHAT) -> str:
    file = http.post("/v1/files", files={"file": ("in.jsonl", data)}, data={"purpose": "batch"})
    assert file.status_code == 200, file.text
    body = {"input_file_id": file.json()["id"], "endpoint": endpoint, "completion_window": "24h"}
    batch = http.post("/v1/batches", json=body)
    assert batch.status_code == 200, batch.text
    return str(batch.json()["id"])


def until(
    http: httpx2.Client, batch: str, done: Callable[[dict[str, Any]], bool], seconds: float = START_SECONDS
) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        state = http.get(f"/v1/batches/{batch}").json()
        if done(state):
            return state
        time.sleep(0.05)
    raise AssertionError(f"the batch is still {state}")


def ended(http: httpx2.Client, batch: str) -> Any:
    state = until(http, batch, lambda state: state["status"] in ENDED)
    BatchObject.model_validate(state)
    return state


def results(http: httpx2.Client, state: dict[str, Any], which: str) -> dict[str, Any]:
    """Lines of the output or error file by custom_id; no id may be there twice."""
    if state[f"{which}_file_id"] is None:
        return {}
    text = http.get(f"/v1/files/{state[f'{which}_file_id']}/content").text
    lines = [json.loads(line) for line in text.splitlines()]
    found = {line["custom_id"]: line for line in lines}
    assert len(found) == len(lines)
    return found


def test_openais_client_works_unchanged(
    client: openai.OpenAI, red: httpx2.Client, world: World, picture: Picture, tmp_path: Path
) -> None:
    image = red.post("/v1/images", files={"file": picture()}).json()["id"]
    world.pictures.routes["/a.png"] = answer(picture())
    inline = "data:image/png;base64," + base64.b64encode(picture()).decode()
    path = tmp_path / "requests.jsonl"
    path.write_bytes(
        jsonl(
            chat_line("text"),
            chat_line("inline", image_part(inline)),
            chat_line("kept", image_part(f"lookonce:{image}")),
            chat_line("fetched", image_part(f"{world.pictures.url}/a.png")),
            b"",
            chat_line("private", image_part(f"http://127.0.0.1:{world.canary.port}/secret.png")),
            chat_line("metadata-server", image_part("http://169.254.169.254/latest/meta-data/")),
            chat_line("too-many", *[image_part(f"{world.pictures.url}/{n}.png") for n in range(17)]),
            chat_line("unknown-field", colour="red"),
            chat_line("streaming", stream=True),
            chat_line("not-mine", image_part("lookonce:img_" + "a" * 52)),
        )
    )
    with path.open("rb") as opened:
        file = client.files.create(file=opened, purpose="batch")
    assert file.filename == "requests.jsonl" and file.bytes == path.stat().st_size and file.purpose == "batch"
    assert client.files.retrieve(file.id) == file and client.files.content(file.id).content == path.read_bytes()
    batch = client.batches.create(
        input_file_id=file.id, endpoint=CHAT, completion_window="24h", metadata={"run": "nightly"}
    )
    assert batch.status == "validating" and batch.expires_at == batch.created_at + 86400
    deadline = time.monotonic() + START_SECONDS
    while batch.status not in ENDED and time.monotonic() < deadline:
        time.sleep(0.1)
        batch = client.batches.retrieve(batch.id)
    assert batch.status == "completed" and batch.metadata == {"run": "nightly"} and batch.errors is None
    counts = batch.request_counts
    assert counts is not None and (counts.total, counts.completed, counts.failed) == (10, 4, 6)
    state = red.get(f"/v1/batches/{batch.id}").json()
    good, bad = results(red, state, "output"), results(red, state, "error")
    assert list(good) == ["text", "inline", "kept", "fetched"]
    for line in good.values():
        assert line["response"]["status_code"] == 200 and line["error"] is None
        assert line["response"]["body"]["object"] == "chat.completion" and line["response"]["body"]["usage"]
    faults = {name: line["response"]["body"]["error"] for name, line in bad.items()}
    url = "messages.0.content.0.image_url.url"
    assert faults["private"]["param"] == faults["metadata-server"]["param"] == url
    assert "no public address" in faults["private"]["message"] and world.canary.connections == 0
    assert "17 images at URLs, the limit is 16" in faults["too-many"]["message"]
    assert faults["unknown-field"]["code"] == "unknown_parameter" and faults["unknown-field"]["param"] == "colour"
    assert faults["streaming"]["param"] == "stream"
    assert bad["not-mine"]["response"]["status_code"] == 404
    assert client.batches.list(limit=1).data[0].id == batch.id
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.content(file.id)


def test_lines_for_the_other_endpoints(red: httpx2.Client, picture: Picture) -> None:
    image = red.post("/v1/images", files={"file": picture()}).json()["id"]
    verdict = {"custom_id": "m", "method": "POST", "url": "/v1/moderations", "body": {"input": "a star"}}
    asked = {"questions": ["What?", {"text": "Star?", "choices": ["yes", "no"]}], "max_tokens": 2}
    url = f"/v1/images/{image}/questions"
    moderated = begin(red, jsonl(verdict), "/v1/moderations")
    answered = begin(
        red, jsonl({"custom_id": "q", "method": "POST", "url": url, "body": asked}), "/v1/images/{id}/questions"
    )
    line = results(red, ended(red, moderated), "output")["m"]
    assert 0 < line["response"]["body"]["results"][0]["category_scores"]["star"] < 1
    first, second = results(red, ended(red, answered), "output")["q"]["response"]["body"]["answers"]
    assert "text" in first and second["choices"].keys() == {"yes", "no"}


def test_a_file_that_is_no_batch_fails_naming_its_lines(red: httpx2.Client) -> None:
    good = chat_line("a")
    lines: list[Any] = [good, b"{", b"[]", {**good, "custom_id": 3}, good, {**good, "url": "/v1/models"}]
    lines += [{**good, "custom_id": "b", "method": "GET"}, {**good, "custom_id": "c", "x": 1}, {"custom_id": "d"}]
    state = ended(red, begin(red, jsonl(*lines)))
    assert state["status"] == "failed" and state["failed_at"] and state["output_file_id"] is None
    told = [(item["line"], item["code"]) for item in state["errors"]["data"]]
    assert told == [
        (2, "invalid_json_line"),
        (3, "invalid_json_line"),
        (4, "invalid_custom_id"),
        (5, "duplicate_custom_id"),
        (6, "mismatched_endpoint"),
        (7, "invalid_method"),
        (8, "unknown_parameter"),
        (9, "missing_required_parameter"),
    ]
    empty = ended(red, begin(red, b"\n \n"))
    assert empty["errors"]["data"][0]["code"] == "empty_file"
    many = ended(red, begin(red, jsonl(*[chat_line(str(n)) for n in range(41)])))
    assert many["errors"]["data"][0]["code"] == "too_many_requests" and many["errors"]["data"][0]["line"] == 41


def test_bad_requests_name_the_field(red: httpx2.Client) -> None:
    def upload(name: str = "file", data: bytes = b"{}", **fields: str) -> Any:
        response = red.post("/v1/files", files={name: ("../../etc/x\n.jsonl", data)}, data=fields)
        assert response.status_code == 400, response.text
        return response.json()["error"]["param"]

    assert upload(purpose="fine-tune") == upload() == "purpose"
    assert upload(name="data", purpose="batch") == "data"
    assert upload(purpose="batch", extra="1") == "extra"
    assert upload(purpose="batch", data=b"") == upload(purpose="batch", data=bytes(70_000)) == "file"
    lifetime = {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "5"}
    assert upload(**lifetime) == "expires_after[seconds]"
    assert red.post("/v1/files", json={}).json()["error"]["param"] == "content-type"
    base = {"input_file_id": "file-x", "endpoint": CHAT, "completion_window": "24h"}
    for change, param in (
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"input_file_id": 3}, "input_file_id"),
        ({"priority": 1}, "priority"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after.seconds"),
    ):
        response = red.post("/v1/batches", json={**base, **change})
        assert response.status_code == 400 and response.json()["error"]["param"] == param, response.text
    assert red.post("/v1/batches", json=base).status_code == 404
    for path, param in (
        ("/v1/files?limit=0", "limit"),
        ("/v1/files?limit=x", "limit"),
        ("/v1/files?order=up", "order"),
        ("/v1/files?after=file-x", "after"),
        ("/v1/batches?limit=101", "limit"),
        ("/v1/batches?after=batch_x", "after"),
        ("/v1/batches?offset=1", "offset"),
    ):
        response = red.get(path)
        assert response.status_code == 400 and response.json()["error"]["param"] == param


def test_files_are_listed_in_pages_and_bounded(blue: httpx2.Client, world: World) -> None:
    made = []
    for number in range(5):
        reply = blue.post(
            "/v1/files",
            files={"file": (f"../{number}\r\nx: y", bytes(30_000))},
            data={"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"},
        )
        FileObject.model_validate(reply.json())
        assert reply.json()["expires_at"] == reply.json()["created_at"] + 3600
        assert reply.json()["filename"].isprintable()
        made.append(reply.json()["id"])
    assert len({name[:12] for name in made}) == 5  # nothing to guess from one to the next
    over = blue.post("/v1/files", files={"file": ("f", bytes(30_000))}, data={"purpose": "batch"})
    assert over.status_code == 400 and "the limit is 160.0 KiB" in over.json()["error"]["message"]
    with openai.OpenAI(base_url=f"{world.gateway.url}/v1", api_key=BLUE, max_retries=0) as client:
        assert [file.id for file in client.files.list(limit=2, order="asc")] == made
        assert [file.id for file in client.files.list(limit=2)] == made[::-1]
        assert list(client.files.list(purpose="batch_output")) == []
    for identifier in made:
        assert blue.delete(f"/v1/files/{identifier}").json() == {"id": identifier, "object": "file", "deleted": True}
    assert blue.get("/v1/files").json()["data"] == []
    assert world.data_dir.stat().st_mode & 0o777 == 0o700


def test_tenants_share_nothing(red: httpx2.Client, blue: httpx2.Client, picture: Picture) -> None:
    image = red.post("/v1/images", files={"file": picture()}).json()["id"]
    mine = begin(red, jsonl(chat_line("a", image_part(f"lookonce:{image}"))))
    state = ended(red, mine)
    file, output = state["input_file_id"], state["output_file_id"]
    body = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
    for response in (
        blue.get(f"/v1/files/{file}"),
        blue.get(f"/v1/files/{output}/content"),
        blue.delete(f"/v1/files/{output}"),
        blue.get(f"/v1/batches/{mine}"),
        blue.post(f"/v1/batches/{mine}/cancel"),
        blue.post("/v1/batches", json=body),
    ):
        assert response.status_code == 404, response.text
    assert blue.get(f"/v1/files?after={file}").status_code == blue.get(f"/v1/batches?after={mine}").status_code == 400
    assert blue.get("/v1/batches").json()["data"] == [] and blue.get("/v1/files").json()["data"] == []
    theirs = ended(blue, begin(blue, jsonl(chat_line("a", image_part(f"lookonce:{image}")))))
    assert results(blue, theirs, "error")["a"]["response"]["status_code"] == 404


def test_cancelling_stops_what_is_under_way(red: httpx2.Client) -> None:
    batch = begin(red, jsonl(*[chat_line(str(n), max_tokens=200, ignore_eos=True) for n in range(40)]))
    until(red, batch, lambda state: state["request_counts"]["completed"] >= 1)
    assert red.post(f"/v1/batches/{batch}/cancel").json()["status"] == "cancelling"
    state = ended(red, batch)
    good, bad = results(red, state, "output"), results(red, state, "error")
    assert state["status"] == "cancelled" and state["cancelled_at"] >= state["cancelling_at"]
    assert 1 <= len(good) == state["request_counts"]["completed"] < 40
    assert good.keys() | bad.keys() == {str(n) for n in range(40)} and not good.keys() & bad.keys()
    assert {line["error"]["code"] for line in bad.values()} == {"batch_cancelled"}
    again = red.post(f"/v1/batches/{batch}/cancel")
    assert again.status_code == 409 and "cancelled" in again.json()["error"]["message"]


def test_too_many_batches_are_refused(blue: httpx2.Client) -> None:
    line = jsonl(*[chat_line(str(n), max_tokens=200, ignore_eos=True) for n in range(20)])
    begun = [begin(blue, line) for _ in range(3)]
    file = blue.get(f"/v1/batches/{begun[0]}").json()["input_file_id"]
    body = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
    refused = blue.post("/v1/batches", json=body)
    assert refused.status_code == 429 and "the limit is 3" in refused.json()["error"]["message"]
    for batch in begun:
        blue.post(f"/v1/batches/{batch}/cancel")
        assert ended(blue, batch)["status"] == "cancelled"


def test_a_killed_gateway_goes_on_where_it_was(services: Services, tmp_path: Path) -> None:
    """SIGKILL, then SIGTERM, in the middle: each line is in the output once, and no finished one was asked again."""
    arguments = (*services.arguments(), "--data-dir", str(tmp_path / "data"), "--batch-concurrency", "2")
    names, tokens = [f"line {n}" for n in range(14)], 150
    before = services.describe_language().generated_tokens
    with GatewayProcess(*arguments) as gateway, gateway.client() as http:
        batch = begin(http, jsonl(*[chat_line(name, max_tokens=tokens, ignore_eos=True) for name in names]))
        killed = until(http, batch, lambda state: state["request_counts"]["completed"] >= 3)
        gateway.process.kill()
        gateway.process.wait()
    with ExitStack() as stack:
        with services.language.frozen():  # so that it is looked at before it has gone on
            gateway = stack.enter_context(GatewayProcess(*arguments))
            http = stack.enter_context(gateway.client())
            state = http.get(f"/v1/batches/{batch}").json()
        assert state["status"] == "in_progress"
        assert 14 > state["request_counts"]["completed"] >= killed["request_counts"]["completed"]
        until(http, batch, lambda state: state["request_counts"]["completed"] >= 8)
        assert gateway.terminate() == 0
    with GatewayProcess(*arguments) as gateway, gateway.client() as http:
        second = subprocess.run(
            [sys.executable, "-m", "gateway", "--port", "0", *arguments],
            cwd=ROOT, capture_output=True, text=True, timeout=START_SECONDS,
        )  # fmt: skip
        assert second.returncode == 1 and "another gateway uses it" in second.stderr
        state = ended(http, batch)
        assert state["status"] == "completed" and state["error_file_id"] is None
        assert state["request_counts"] == {"total": 14, "completed": 14, "failed": 0}
        good = results(http, state, "output")
        assert list(good) == names
        assert {line["response"]["body"]["usage"]["completion_tokens"] for line in good.values()} == {tokens}
    # The kill may cost the two lines under way; draining costs none.
    assert services.describe_language().generated_tokens - before <= (14 + 2) * tokens


def test_what_is_undone_expires(services: Services, tmp_path: Path) -> None:
    arguments = (*services.arguments(), "--data-dir", str(tmp_path), "--batch-window", "2", "--batch-concurrency", "1")
    with GatewayProcess(*arguments) as gateway, gateway.client() as http:
        batch = begin(http, jsonl(*[chat_line(str(n), max_tokens=300, ignore_eos=True) for n in range(200)]))
        state = ended(http, batch)
        good, bad = results(http, state, "output"), results(http, state, "error")
    assert state["status"] == "expired" and state["expired_at"] >= state["expires_at"]
    assert good.keys() | bad.keys() == {str(n) for n in range(200)} and bad and not good.keys() & bad.keys()
    assert {(line["response"], line["error"]["code"]) for line in bad.values()} == {(None, "batch_expired")}


def test_lines_wait_for_services_that_are_away(services: Services, tmp_path: Path) -> None:
    nowhere = f"unix:{tmp_path}/none.sock"
    data = ("--data-dir", str(tmp_path / "data"), "--reconnect-wait", "100ms")
    away = ("--vision", services.vision.address, "--lm", nowhere)
    with GatewayProcess(*away, *data) as gateway, gateway.client() as http:
        batch = begin(http, jsonl(chat_line("a")))
        until(http, batch, lambda state: state["status"] == "in_progress")
        time.sleep(1)
        assert http.get(f"/v1/batches/{batch}").json()["request_counts"] == {"total": 1, "completed": 0, "failed": 0}
        assert gateway.terminate() == 0
    with GatewayProcess(*services.arguments(), *data) as gateway, gateway.client() as http:
        state = ended(http, batch)
        assert list(results(http, state, "output")) == ["a"], results(http, state, "error")


def test_without_a_data_directory_it_says_how_to_get_one(http: httpx2.Client) -> None:
    for method, path in (("POST", "/v1/files"), ("GET", "/v1/files"), ("POST", "/v1/batches")):
        response = http.request(method, path)
        assert response.status_code == 400 and "--data-dir" in response.json()["error"]["message"]


async def test_lines_make_way_for_people() -> None:
    waiting = 1
    lanes = Lanes(3, lambda: waiting)
    await lanes.enter()
    others = [asyncio.create_task(lanes.enter()) for _ in range(3)]
    await asyncio.sleep(0.3)
    assert lanes.busy == 1
    waiting = 0
    async with asyncio.timeout(60):
        while lanes.busy < 3:  # noqa: ASYNC110  # they look at intervals of their own
            await asyncio.sleep(0.01)
    lanes.closed = True
    lanes.leave()
    await asyncio.sleep(0.3)
    assert lanes.busy == 2
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    lanes.leave()
    lanes.leave()
    await lanes.empty()
