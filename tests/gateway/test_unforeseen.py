"""What nobody foresaw, in a route or around all routes: one answer in the one shape, one log line, nothing told."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import pytest
from starlette.requests import ClientDisconnect
from structlog.testing import capture_logs

from gateway.app import build
from gateway.auth import KeyOwner, Keyring
from gateway.http.asgi import create_app
from gateway.images.erasure import Eraser
from gateway.routing.variants import Variants
from gateway.settings import GatewaySettings


class BrokenKeyring(Keyring):
    def identify(self, presented: str | None) -> KeyOwner:
        raise ZeroDivisionError("a secret")


async def ask(method: str, keyring: Keyring, error: Exception) -> httpx2.Response:
    gateway = build(GatewaySettings(vision="unix:/nowhere", lm="unix:/nowhere", access_log=True))
    app, routes = create_app(gateway, keyring)

    async def fail() -> Any:
        raise error

    routes.add_api_route("/fails", fail, methods=["GET", "HEAD", "POST"])
    try:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://localhost") as client:
            return await client.request(method, "/fails")
    finally:
        await gateway.close()


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
@pytest.mark.parametrize("keyring", [Keyring([]), BrokenKeyring([])])
def test_an_unforeseen_error_has_the_one_shape(method: str, keyring: Keyring) -> None:
    with capture_logs() as logged:
        response = asyncio.run(ask(method, keyring, RuntimeError("a secret")))
    assert response.status_code == 500 and response.headers["content-type"] == "application/json"
    expected = {"message": "internal error", "type": "server_error", "param": None, "code": "internal_error"}
    assert method == "HEAD" or response.json()["error"] == expected
    failures = [line for line in logged if line["event"] == "request failed"]
    assert [line["request_id"] for line in failures] == [response.headers["x-request-id"]]
    assert [line["status"] for line in logged if line["event"] == "request"] == [500]


def test_a_client_that_left_is_no_failure() -> None:
    with capture_logs() as logged:
        assert asyncio.run(ask("POST", Keyring([]), ClientDisconnect())).status_code == 499
    assert [line["status"] for line in logged if line["event"] == "request"] == [499]
    assert not [line for line in logged if line["event"] == "request failed"]


async def test_an_erasure_whose_tries_fail_unforeseen_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.images.erasure.FIRST_PAUSE", 0.01)
    outcomes: list[Exception | bool] = [ZeroDivisionError("a"), ZeroDivisionError("b"), False, True]
    done = asyncio.Event()

    async def attempt() -> bool:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        if outcome:
            done.set()
        return outcome

    eraser = Eraser(Variants([], lambda spec: pytest.fail("connected")))
    assert await eraser.erase("image", attempt) is False
    await asyncio.wait_for(done.wait(), 60)
    await eraser.close()
    assert not outcomes
