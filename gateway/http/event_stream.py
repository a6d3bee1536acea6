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
    event; ends with [DONE]. Closes `events` in any case."""

    media_type = "text/event-stream"
    comment, last = HEARTBEAT, DONE

    def __init__(self, events: AsyncGenerator[Mapping[str, Any], None], *, heartbeat: float = 15.0) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._heartbeat = heartbeat
        self._sent = 0.0  # when the last event went out, on the monotonic clock

    def encoded(self, data: Mapping[str, Any]) -> bytes:
        """One event."""
        return event(data)

    def failure(self, error: LookonceError) -> bytes:
        """The error event."""
        return event(error_body(error))

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
        await _write(send, self.last, more=False)

    async def _send_events(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            try:
                async for data in events:
                    self._sent = time.monotonic()
                    await _write(send, self.encoded(data))
            except LookonceError as error:
                await _write(send, self.failure(error))
            except Exception:
                log.exception("stream failed")
                await _write(send, self.failure(LookonceError(ErrorKind.INTERNAL, "internal error")))

    async def _beat(self, send: Send) -> None:
        self._sent = time.monotonic()
        while True:
            quiet = time.monotonic() - self._sent
            if quiet >= self._heartbeat:
                self._sent = time.monotonic()
                await _write(send, self.comment)
            else:
                await asyncio.sleep(self._heartbeat - quiet)


class NamedEventStream(EventStream):
    """The same with each event called by its `type`, and nothing behind the last."""

    last = b""

    def encoded(self, data: Mapping[str, Any]) -> bytes:
        """See EventStream."""
        return f"event: {data['type']}\n".encode() + event(data)

    def failure(self, error: LookonceError) -> bytes:
        """See EventStream."""
        return b"event: error\n" + event({**error_body(error)["error"], "type": "error"})


class LineStream(EventStream):
    """Lines of JSON; an empty one, which readers skip, is the comment."""

    media_type = "application/x-ndjson"
    comment, last = b"\n", b""

    def encoded(self, data: Mapping[str, Any]) -> bytes:
        """See EventStream."""
        return orjson.dumps(data) + b"\n"

    def failure(self, error: LookonceError) -> bytes:
        """See EventStream."""
        return orjson.dumps({"error": error.message}) + b"\n"


async def _write(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})
