"""A language service that is full of others' work: whoever comes next is told so, once, and nothing is tried again."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.gateway.conftest import Services
from tests.gateway.processes import GatewayProcess
from tests.processes import START_SECONDS, ServiceProcess

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
LONG = {"questions": ["Go on."], "max_tokens": 8000, "ignore_eos": True, "stream": True}


@pytest.mark.slow
def test_a_full_language_service_is_a_429_and_room_is_an_answer(
    services: Services, checkpoint: Path, image_file: Callable[..., bytes]
) -> None:
    bounds = ("--max-running", "1", "--max-waiting", "1")
    common = ("--model", str(checkpoint), "--store", services.store, "--vision", services.vision.address)
    with ExitStack() as stack:
        language = stack.enter_context(ServiceProcess("lm_service", *common, *bounds))
        addresses = ("--vision", services.vision.address, "--lm", language.address)
        gateway = stack.enter_context(GatewayProcess(*addresses))
        http = stack.enter_context(gateway.client())
        full = Services(services.vision, language, services.store)
        image = http.post("/v1/images", files={"file": image_file()}).json()["id"]
        path = f"/v1/images/{image}/questions"
        with ExitStack() as others:
            for running, waiting in ((1, 0), (1, 1)):
                others.enter_context(http.stream("POST", path, json=LONG))
                until(full, running, waiting)
            for where, body in (
                ("/v1/chat/completions", CHAT),
                ("/v1/chat/completions", CHAT | {"stream": True}),
                (path, {"questions": ["What?"]}),
                (path, {"questions": ["What?"] * 200}),
                (path, {"questions": [{"text": "Is it?", "choices": ["yes", "no"]}]}),
            ):
                refused = http.post(where, json=body)
                assert refused.status_code == 429, refused.text
                assert refused.json()["error"]["code"] == "overloaded" and int(refused.headers["retry-after"]) >= 1
            told = full.describe_language()
            assert (told.running, told.waiting) == (1, 1), "accepted work goes on"
        until(full, 0, 0)
        many = http.post(path, json={"questions": ["What?"] * 20, "max_tokens": 1})  # more than there is room for
        assert many.status_code == 200 and all("text" in answer for answer in many.json()["answers"][:1])


def until(services: Services, running: int, waiting: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        state = services.describe_language()
        if (state.running, state.waiting) == (running, waiting):
            return
        assert time.monotonic() < deadline, state
        time.sleep(0.02)
