"""Batches over kills, restarts and services that are away: every line exactly once."""

from __future__ import annotations

import asyncio
import re
import sqlite3
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx2

from gateway.batches.worker import ConcurrencyClasses
from lookonce.core.process import PERMANENT_EXIT
from tests.gateway.batching import begin, chat_line, ended, jsonl, results, until
from tests.gateway.conftest import Services
from tests.gateway.processes import GatewayProcess
from tests.processes import ROOT, START_SECONDS


def test_a_killed_gateway_goes_on_where_it_was(services: Services, tmp_path: Path) -> None:
    """SIGKILL, then SIGTERM, in the middle: each line is in the output once, and no finished one was asked again."""
    arguments = (*services.arguments(), "--data-dir", str(tmp_path / "data"), "--batch-concurrency", "2")
    names, tokens = [f"line {n}" for n in range(14)], 250
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
        assert second.returncode == PERMANENT_EXIT and "another gateway uses it" in second.stderr
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
    classes = ConcurrencyClasses(3, lambda: waiting)
    await classes.enter()
    others = [asyncio.create_task(classes.enter()) for _ in range(3)]
    await asyncio.sleep(0.3)
    assert classes.busy == 1
    waiting = 0
    async with asyncio.timeout(60):
        while classes.busy < 3:  # noqa: ASYNC110  # they look at intervals of their own
            await asyncio.sleep(0.01)
    classes.closed = True
    classes.leave()
    await asyncio.sleep(0.3)
    assert classes.busy == 2
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    classes.leave()
    classes.leave()
    await classes.empty()


def test_rows_that_lie_in_the_wrong_place_fail_and_answer_for_no_other(services: Services, tmp_path: Path) -> None:
    data = ("--data-dir", str(tmp_path / "data"), "--reconnect-wait", "100ms")
    away = ("--vision", services.vision.address, "--lm", f"unix:{tmp_path}/none.sock")
    with GatewayProcess(*away, *data) as gateway, gateway.client() as http:
        batch, lost = begin(http, jsonl(*[chat_line(name) for name in "abcd"])), begin(http, jsonl(chat_line("e")))
        for one in (batch, lost):
            until(http, one, lambda state: state["status"] == "in_progress")
        files = [http.get(f"/v1/batches/{one}").json()["input_file_id"] for one in (batch, lost)]
    other = "(SELECT request FROM lines WHERE custom_id = 'b')"
    with sqlite3.connect(tmp_path / "data" / "batches.sqlite3") as database:
        database.execute(f"UPDATE lines SET request = {other} WHERE custom_id = 'a'")
        database.execute("UPDATE lines SET request = substr(request, 1, 40) WHERE custom_id = 'c'")
        database.execute("UPDATE lines SET custom_id = 'f' WHERE custom_id = 'e'")
        database.execute("UPDATE pieces SET data = (SELECT data FROM pieces ORDER BY file LIMIT 1)")
    database.close()
    with GatewayProcess(*services.arguments(), *data) as gateway, gateway.client() as http:
        state = ended(http, batch)
        assert state["request_counts"] == {"total": 4, "completed": 2, "failed": 2}
        assert list(results(http, state, "output")) == ["b", "d"]
        bad = results(http, state, "error")
        assert [(name, bad[name]["error"]["code"]) for name in bad] == [
            ("a", "internal_error"),
            ("c", "internal_error"),
        ]
        assert list(results(http, ended(http, lost), "error")) == ["f"], "a request is its own name's, too"
        assert b'"a"' in http.get(f"/v1/files/{files[0]}/content").content
        with suppress(httpx2.TransportError):
            assert b'"a"' not in http.get(f"/v1/files/{files[1]}/content").content
        assert 'lookonce_store_corrupt_total{namespace="batches",store="sqlite"} 4.0' in http.get("/metrics").text


def test_files_and_batches_whose_rows_are_anothers_are_not_there(services: Services, tmp_path: Path) -> None:
    data = ("--data-dir", str(tmp_path / "data"), "--reconnect-wait", "100ms")
    away = ("--vision", services.vision.address, "--lm", f"unix:{tmp_path}/none.sock")
    with GatewayProcess(*away, *data) as gateway, gateway.client() as http:
        batches = [begin(http, jsonl(chat_line(name))) for name in ("swapped", "too", "counted", "inputless", "good")]
        for batch in batches:
            until(http, batch, lambda state: state["status"] == "in_progress")
        files = {batch: http.get(f"/v1/batches/{batch}").json()["input_file_id"] for batch in batches}
    first, second, counted, inputless, good = batches
    with sqlite3.connect(tmp_path / "data" / "batches.sqlite3") as database:
        document = "SELECT document FROM batches WHERE id = ?"
        (one,), (two,) = (database.execute(document, (batch,)).fetchone() for batch in (first, second))
        put = "UPDATE batches SET document = ? WHERE id = ?"
        database.executemany(put, [(two, first), (one, second)])
        database.execute("UPDATE batches SET completed = 1 WHERE id = ?", (counted,))
        database.execute("UPDATE files SET filename = 'other' WHERE id = ?", (files[good],))
        database.execute("UPDATE files SET tenant = 'other' WHERE id = ?", (files[counted],))
        database.execute("UPDATE batches SET status = 'validating' WHERE id = ?", (inputless,))
        database.execute("UPDATE files SET seal = 'text' WHERE id = ?", (files[first],))
    database.close()
    with GatewayProcess(*services.arguments(), *data) as gateway, gateway.client() as http:
        assert list(results(http, ended(http, good), "output")) == ["good"]
        for batch in (first, second, counted, inputless):
            assert http.get(f"/v1/batches/{batch}").status_code == 404
            assert http.post(f"/v1/batches/{batch}/cancel").status_code == 404
        assert [batch["id"] for batch in http.get("/v1/batches").json()["data"]] == [good]
        assert http.get(f"/v1/files/{files[good]}").status_code == 404
        assert http.get(f"/v1/files/{files[first]}/content").status_code == 404
        told = {file["id"] for file in http.get("/v1/files").json()["data"] if file["purpose"] == "batch"}
        assert told == {files[second], files[inputless]}
        counted_now = re.search(r'corrupt_total{namespace="batches",store="sqlite"} (\d+)', http.get("/metrics").text)
        assert counted_now and int(counted_now[1]) >= 6
    with sqlite3.connect(tmp_path / "data" / "batches.sqlite3") as database:
        assert database.execute("SELECT id FROM batches").fetchall() == [(good,)]
    database.close()


def test_a_batch_whose_input_lacks_its_end_fails(services: Services, tmp_path: Path) -> None:
    data = ("--data-dir", str(tmp_path / "data"), "--reconnect-wait", "100ms")
    with GatewayProcess(*services.arguments(), *data) as gateway, gateway.client() as http:
        text = jsonl(chat_line("a")) + b"\n" * 600_000
        file = http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("a.jsonl", text)}).json()["id"]
        with sqlite3.connect(tmp_path / "data" / "batches.sqlite3") as database:
            assert database.execute("DELETE FROM pieces WHERE number = 2").rowcount == 1
        database.close()
        given = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        state = ended(http, http.post("/v1/batches", json=given).json()["id"])
        assert state["status"] == "failed" and state["errors"]["data"][0]["code"] == "file_not_found"
