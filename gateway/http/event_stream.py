"""Server-sent events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from typing import Any

import orjson
import structlog
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.http.error_bodies import error_body
from gateway.http.route import ClientGone, until_disconnect
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.tasks import end_tasks, start_task

DONE = b"data: [DONE]\n\n"
HEARTBEAT = b": still here\n\n"
"""A comment: keeps proxies from closing a quiet stream, is no event to any reader."""
log = structlog.get_logger(__name__)


def event(data: Mapping[str, Any]) -> bytes:
    """One event."""
    return b"data: " + orjson.dumps(data) + b"\n\n"


class EventStream(Response):
    """Sends events as they come, a comment when there was none for `heartbeat` seconds; a failure becomes an error
    event; ends with [DONE]. Closes `events` in any case. `named` events are called by their `type`, and
    no [DONE] ends them."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[Mapping[str, Any], None], *, heartbeat: float = 15.0, named: bool = False
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._heartbeat, self._named = heartbeat, named
        self._sent = 0.0  # when the last event went out, on the monotonic clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientGone):
            await until_disconnect(Request(scope, receive), self._pump(send))

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        beating = start_task(self._beat(send))
        try:
            await self._send_events(send)
        finally:
            await end_tasks(beating)
        await _write(send, b"" if self._named else DONE, more=False)

    async def _send_events(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            try:
                async for data in events:
                    self._sent = time.monotonic()
                    name = f"event: {data['type']}\n".encode() if self._named else b""
                    await _write(send, name + event(data))
            except LookonceError as error:
                await _write(send, self._failure(error))
            except Exception:
                log.exception("stream failed")
                await _write(send, self._failure(LookonceError(ErrorKind.INTERNAL, "internal error")))

    def _failure(self, error: LookonceError) -> bytes:
        body = error_body(error)
        return b"event: error\n" + event({**body["error"], "type": "error"}) if self._named else event(body)

    async def _beat(self, send: Send) -> None:
        self._sent = time.monotonic()
        while True:
            quiet = time.monotonic() - self._sent
            if quiet >= self._heartbeat:
                self._sent = time.monotonic()
                await _write(send, HEARTBEAT)
            else:
                await asyncio.sleep(self._heartbeat - quiet)


async def _write(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})
