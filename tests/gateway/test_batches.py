"""Files and batches through OpenAI's client and over HTTP: every line exactly once, whatever happens to the process."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from gateway.schemas.batch_bodies import FileObject
from tests.fetching.servers import Canary, ImageServer, answer
from tests.gateway.batching import CHAT, ENDED, begin, chat_line, ended, image_part, jsonl, results, until
from tests.gateway.conftest import Services
from tests.gateway.processes import GatewayProcess
from tests.processes import START_SECONDS

ImageFile = Callable[..., bytes]
RED, BLUE = "red-0123456789abcdef", "blue-0123456789abcdef"
KEYS = {"LOOKONCE_GATEWAY_API_KEYS": f"red={RED},blue={BLUE}", "LOOKONCE_GATEWAY_SECRET": "a secret"}


@dataclass
class World:
    """A gateway with a data directory that may fetch from 127.0.0.2 alone, a server there, a canary on 127.0.0.1."""

    gateway: GatewayProcess
    images: ImageServer
    canary: Canary
    data_dir: Path


@pytest.fixture(scope="module")
def world(services: Services, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    data_dir = tmp_path_factory.mktemp("batches")
    policy = data_dir / "policy.yaml"
    policy.write_text("categories: [{id: star, question: 'Is there a star?'}]")
    with Canary() as canary, ImageServer(host="127.0.0.2") as images:
        rules = ("--fetch-ports", f"{canary.port},{images.port}", "--fetch-allow-networks", "127.0.0.2/32")
        limits = ("--max-file-bytes", "64KiB", "--max-stored-bytes", "160KiB", "--max-batch-lines", "40")
        own = ("--data-dir", str(data_dir / "deep" / "data"), "--policy", str(policy), "--max-batches", "3")
        with GatewayProcess(*services.arguments(), *rules, *limits, *own, env=KEYS) as gateway:
            yield World(gateway, images, canary, data_dir / "deep" / "data")


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


def test_openais_client_works_unchanged(
    client: openai.OpenAI, red: httpx2.Client, world: World, image_file: ImageFile, tmp_path: Path
) -> None:
    image = red.post("/v1/images", files={"file": image_file()}).json()["id"]
    world.images.routes["/a.png"] = answer(image_file())
    inline = "data:image/png;base64," + base64.b64encode(image_file()).decode()
    path = tmp_path / "requests.jsonl"
    path.write_bytes(
        jsonl(
            chat_line("text"),
            chat_line("inline", image_part(inline)),
            chat_line("kept", image_part(f"lookonce:{image}")),
            chat_line("fetched", image_part(f"{world.images.url}/a.png")),
            b"",
            chat_line("private", image_part(f"http://127.0.0.1:{world.canary.port}/secret.png")),
            chat_line("metadata-server", image_part("http://169.254.169.254/latest/meta-data/")),
            chat_line("too-many", *[image_part(f"{world.images.url}/{n}.png") for n in range(17)]),
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
    told = [line["response"]["body"]["usage"] for line in good.values()]
    assert batch.usage is not None and batch.usage.total_tokens == sum(usage["total_tokens"] for usage in told)
    assert batch.usage.output_tokens == sum(usage["completion_tokens"] for usage in told) > 0
    assert batch.usage.input_tokens_details.cached_tokens <= batch.usage.input_tokens
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


def test_lines_for_the_other_endpoints(red: httpx2.Client, image_file: ImageFile) -> None:
    image = red.post("/v1/images", files={"file": image_file()}).json()["id"]
    part = image_part(f"data:image/png;base64,{base64.b64encode(image_file()).decode()}")
    verdicts = [
        {"custom_id": name, "method": "POST", "url": "/v1/moderations", "body": {"input": what}}
        for name, what in (("text", "a star"), ("image", [part]))
    ]
    asked = {"questions": ["What?", {"text": "Star?", "choices": ["yes", "no"]}], "max_tokens": 2, "max_pixels": 1600}
    url = f"/v1/images/{image}/questions"
    moderated = begin(red, jsonl(*verdicts), "/v1/moderations")
    answered = begin(
        red, jsonl({"custom_id": "q", "method": "POST", "url": url, "body": asked}), "/v1/images/{id}/questions"
    )
    lines = results(red, ended(red, moderated), "output")
    judged = {name: line["response"]["body"]["results"][0] for name, line in lines.items()}
    assert {name: result["category_applied_input_types"]["star"] for name, result in judged.items()} == {
        "text": ["text"],
        "image": ["image"],
    }
    assert all(0 < result["category_scores"]["star"] < 1 for result in judged.values())
    first, second = results(red, ended(red, answered), "output")["q"]["response"]["body"]["answers"]
    prompts = first["usage"]["prompt_tokens"] + second["usage"]["prompt_tokens"]
    assert ended(red, answered)["usage"]["input_tokens"] == prompts
    assert "text" in first and second["choices"].keys() == {"yes", "no"}
    assert first["usage"]["prompt_tokens_details"]["image_tokens"] == 1  # of 6


def test_a_line_that_is_wrong_fails_alone(red: httpx2.Client) -> None:
    good = chat_line("a")
    lines: list[Any] = [b"\xef\xbb\xbf" + jsonl(good).strip(), b"{", b"[]", {**good, "custom_id": 3}, good]
    lines += [{**good, "custom_id": "away", "url": "/v1/models"}, {**good, "custom_id": "b", "method": "GET"}]
    lines += [{**good, "custom_id": "c", "x": 1}, {"custom_id": "d"}, b"\xef\xbb\xbf", b"\xff\xfe{\x00}\x00"]
    lines += [b"\xef\xbb\xbf" + jsonl(chat_line("e")).strip()]
    state = ended(red, begin(red, jsonl(*lines)))
    assert state["status"] == "completed" and state["errors"] is None
    assert state["request_counts"] == {"total": 11, "completed": 2, "failed": 9}
    assert results(red, state, "output").keys() == {"a", "e"}
    text = red.get(f"/v1/files/{state['error_file_id']}/content").text
    told = [json.loads(line) for line in text.splitlines()]
    assert {line["response"] for line in told} == {None} and len({line["id"] for line in told}) == 9
    assert [(line["error"]["line"], line["custom_id"], line["error"]["code"]) for line in told] == [
        (2, None, "invalid_json_line"),
        (3, None, "invalid_json_line"),
        (4, None, "invalid_custom_id"),
        (5, "a", "duplicate_custom_id"),
        (6, "away", "mismatched_endpoint"),
        (7, "b", "invalid_method"),
        (8, "c", "unknown_parameter"),
        (9, "d", "missing_required_parameter"),
        (11, None, "invalid_json_line"),
    ]


def test_a_file_that_is_no_batch_fails_naming_its_lines(red: httpx2.Client) -> None:
    state = ended(red, begin(red, jsonl(b"{", {"custom_id": "d"})))
    assert state["status"] == "failed" and state["failed_at"] and state["output_file_id"] is None
    told = [(item["line"], item["code"]) for item in state["errors"]["data"]]
    assert told == [(1, "invalid_json_line"), (2, "missing_required_parameter")]
    assert state["request_counts"] == {"total": 0, "completed": 0, "failed": 0}
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


def test_lines_may_ask_for_a_form_and_for_calls(red: httpx2.Client) -> None:
    schema = {"type": "object", "properties": {"sure": {"type": "boolean"}}, "required": ["sure"]}
    form = {"type": "json_schema", "json_schema": {"name": "f", "schema": schema}}
    tool = {"type": "function", "function": {"name": "tell", "parameters": schema}}
    lines = [
        chat_line("form", response_format=form, max_tokens=40),
        chat_line("call", tools=[tool], tool_choice="required", parallel_tool_calls=False, max_tokens=60),
        chat_line(
            "wrong", response_format={"type": "json_schema", "json_schema": {"name": "f", "schema": {"not": {}}}}
        ),
    ]
    state = ended(red, begin(red, jsonl(*lines)))
    good, bad = results(red, state, "output"), results(red, state, "error")
    said = {name: line["response"]["body"]["choices"][0]["message"] for name, line in good.items()}
    assert json.loads(said["form"]["content"])["sure"] in (True, False)
    assert json.loads(said["call"]["tool_calls"][0]["function"]["arguments"])["sure"] in (True, False)
    assert bad["wrong"]["response"]["body"]["error"]["param"] == "response_format.json_schema.schema"
