"""500 event streams at once through one gateway, and what a disconnect frees."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import httpx2
import pytest

from tests.gateway.conftest import Services
from tests.gateway.processes import GatewayProcess

STREAMS = 500
FREED_WITHIN = 120.0  # seconds; the machine may be busy, this is no measurement


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_five_hundred_streams_run_at_once_and_disconnects_free_their_places(
    gateway: GatewayProcess, services: Services, image_file: Callable[..., bytes]
) -> None:
    limits = httpx2.Limits(max_connections=STREAMS + 8)
    async with httpx2.AsyncClient(base_url=gateway.url, timeout=240, limits=limits, trust_env=False) as http:
        image = (await http.post("/v1/images", files={"file": image_file()})).json()["id"]
        path = f"/v1/images/{image}/questions"
        await asyncio.gather(*(_whole(http, path) for _ in range(STREAMS)))
        assert await _in_flight(http) == 0
        left = [asyncio.create_task(_begun(http, path)) for _ in range(STREAMS)]
        while await _in_flight(http) <= STREAMS // 2:  # noqa: ASYNC110 -- another process has no event to wait for
            await asyncio.sleep(0.05)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        deadline = time.monotonic() + FREED_WITHIN
        while await _in_flight(http) > 0 or await asyncio.to_thread(_held, services):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)


def _held(services: Services) -> int:
    """Requests that the language service still works on."""
    state = services.describe_language()
    return state.running + state.waiting


async def _whole(http: httpx2.AsyncClient, path: str) -> None:
    body = {"questions": ["What?"], "max_tokens": 2, "stream": True}
    async with http.stream("POST", path, json=body) as response:
        assert response.status_code == 200
        lines = [line async for line in response.aiter_lines() if line.startswith("data:")]
    assert len(lines) == 2 and lines[1] == "data: [DONE]"


async def _begun(http: httpx2.AsyncClient, path: str) -> None:
    body = {"questions": ["Go on."], "max_tokens": 200, "ignore_eos": True, "stream": True}
    async with http.stream("POST", path, json=body) as response:
        async for _ in response.aiter_lines():
            pass


async def _in_flight(http: httpx2.AsyncClient) -> int:
    text = (await http.get("/metrics")).text
    line = next(line for line in text.splitlines() if line.startswith("lookonce_gateway_in_flight "))
    return int(float(line.split()[1]))
