"""`lookonce top` on a running gateway, and its arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import httpx2
import pytest
from rich.console import Console

from lookonce.cli.top_frame import frame, read
from tests.cli.commands import invoke
from tests.gateway.processes import GatewayProcess


def test_one_frame_of_a_running_system(
    gateway: GatewayProcess, http: httpx2.Client, image_file: Callable[..., bytes]
) -> None:
    image = http.post("/v1/images", files={"file": image_file()}).json()["id"]
    body = {"questions": ["What?", "Where?"], "max_tokens": 2}
    assert http.post(f"/v1/images/{image}/questions", json=body).status_code == 200
    shown = invoke("top", "--once", "--url", gateway.url)
    assert shown.returncode == 0, shown.stderr
    first = shown.stdout.splitlines()[0]
    assert gateway.url in first and "ready" in first and "language 1/1" in first and "vision 1/1" in first
    for said in ("requests", "prefix hits", "encodes", "stores", "images", "--also"):
        assert said in shown.stdout, said


def test_nobody_there(tmp_path) -> None:
    assert "no `lookonce up` runs on" in invoke("top", "--once", "--data-dir", tmp_path).stderr
    gone = invoke("top", "--once", "--url", "http://127.0.0.1:9")
    assert gone.returncode == 1 and "cannot reach http://127.0.0.1:9/metrics" in gone.stderr


BEFORE = """
# TYPE lookonce_gateway_requests counter
lookonce_gateway_requests_total{route="/a",status="200"} 10
lookonce_gateway_requests_total{route="/b",status="503"} 1
# TYPE lookonce_gateway_request_seconds histogram
lookonce_gateway_request_seconds_bucket{le="0.1"} 10
lookonce_gateway_request_seconds_bucket{le="1.0"} 10
lookonce_gateway_request_seconds_bucket{le="+Inf"} 11
# TYPE lookonce_gateway_answers counter
lookonce_gateway_answers_total{embedding="hit",prefix="hit"} 4
lookonce_gateway_answers_total{embedding="hit",prefix="miss"} 4
"""
AFTER = BEFORE.replace("} 10", "} 30").replace("} 11", "} 31").replace('prefix="hit"} 4', 'prefix="hit"} 10')


def test_rates_are_of_what_was_gained() -> None:
    before, now = read([BEFORE], 100.0), read([AFTER], 104.0)
    assert now.sum("lookonce_gateway_requests_total", status="200") == 30
    assert now.quantile("lookonce_gateway_request_seconds", 0.5) == pytest.approx(0.1)
    assert now.quantile("lookonce_gateway_request_seconds", 0.99) == float("inf")
    assert now.quantile("lookonce_gateway_request_seconds", 0.99, before) == pytest.approx(0.1)
    assert before.quantile("lookonce_nothing", 0.5) is None
    console = Console(width=200, record=True, file=None, quiet=False)
    with console.capture() as captured:
        console.print(frame("http://x", {"status": "degraded", "parts": {"image_store": "degraded"}}, now, before))
    text = captured.get()
    assert "5.0/s" in text and "100%" in text and "0.0/s" in text and "image store degraded" in text


def test_polls_are_no_requests_of_users() -> None:
    polled = BEFORE + 'lookonce_gateway_requests_total{route="/readyz",status="503"} 7777\n'
    polled += 'lookonce_gateway_request_seconds_bucket{route="/readyz",le="+Inf"} 7777\n'
    console = Console(width=200)
    shown = []
    for text in (BEFORE, polled):
        with console.capture() as captured:
            console.print(frame("http://x", {}, read([text], 0.0), None))
        shown.append(captured.get())
    assert shown[0] == shown[1]


def test_totals_and_services() -> None:
    extra = "# TYPE lookonce_lm_running gauge\nlookonce_lm_running 3\n# TYPE lookonce_store_hits counter\n"
    extra += 'lookonce_store_hits_total{namespace="embeddings",store="redis"} 9\n'
    extra += (
        '# TYPE lookonce_store_misses counter\nlookonce_store_misses_total{namespace="embeddings",store="redis"} 1\n'
    )
    console = Console(width=200)
    with console.capture() as captured:
        console.print(frame("http://x", {}, read([BEFORE, extra], 0.0), None))
    text = captured.get()
    assert "unreachable" in text and "90%" in text and "50%" in text
    assert "no measurements" not in text
