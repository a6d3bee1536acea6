"""One trace over all hops: what a client sends, or the gateway begins, is named by every process that did some of the
work."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable

import httpx2
import pytest

from tests.gateway.conftest import Services
from tests.gateway.processes import GatewayProcess
from tests.processes import START_SECONDS, ServiceProcess

ASK = {"questions": ["What?", {"text": "Is it?", "choices": ["yes", "no"]}], "max_tokens": 1}


def methods(service: ServiceProcess, trace: str, wanted: set[str]) -> set[str]:
    """The calls that a service logged under a trace; waits for those wanted."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        lines = [json.loads(line) for line in service.log.splitlines() if line.startswith("{")]
        calls = [line["method"] for line in lines if line.get("trace_id") == trace and "method" in line]
        found = {call.rpartition("/")[2] for call in calls}
        if found >= wanted or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


@pytest.mark.parametrize("own", [True, False], ids=["the client's", "the gateway's"])
def test_every_process_names_the_trace(
    gateway: GatewayProcess, http: httpx2.Client, services: Services, image_file: Callable[..., bytes], own: bool
) -> None:
    trace, span = secrets.token_hex(16), secrets.token_hex(8)
    headers = {"traceparent": f"00-{trace}-{span}-01"} if own else {}
    uploaded = http.post("/v1/images", files={"file": image_file()}, headers=headers)
    answered = uploaded.headers["traceparent"].split("-")
    assert (answered[1] == trace) is own and answered[2] != span
    assert methods(services.vision, answered[1], {"Encode"}) == {"Encode"}
    asked = http.post(f"/v1/images/{uploaded.json()['id']}/questions", json=ASK, headers=headers)
    other = asked.headers["traceparent"].split("-")
    assert (other[1] == answered[1]) is own and other[2] != answered[2]
    assert methods(services.language, other[1], {"Generate", "Score"}) == {"Generate", "Score"}
    assert gateway.line("request", trace_id=other[1], route="/v1/images/{image_id}/questions")["status"] == 200
