"""What a request may bring: a body, bounded in bytes and in time and together with all others', and a place among the
requests that are worked on. It is taken once the body is there: whoever sends slowly keeps nobody else from one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.http.error_bodies import HttpRefusal, error_response
from gateway.metrics import IN_FLIGHT, REJECTED
from gateway.settings import GatewaySettings
from lookonce.core.errors import ErrorKind, LookonceError

SMALL = 1 << 16
"""Bytes of a body that is received even while all bodies together are too large."""


@dataclass(frozen=True)
class BodyLimits:
    """Of all requests."""

    max_bytes: int  # of one body
    total_bytes: int  # of the bodies of all requests under way
    silence: float  # seconds in which nothing of a body comes
    rate: int  # bytes a second; a slower body has `silence` seconds more than it would take

    @classmethod
    def of(cls, settings: GatewaySettings) -> BodyLimits:
        """Those of the settings."""
        total = max(settings.max_bodies_bytes, settings.max_body_bytes)
        return cls(settings.max_body_bytes, total, settings.body_timeout, settings.body_rate)


class Intake:
    """Bounds bodies (before anything parses them, chunked ones too) and the requests worked on at once."""

    def __init__(
        self, app: ASGIApp, limits: BodyLimits, *, max_concurrency: int, free: frozenset[str] = frozenset()
    ) -> None:
        """Requests for the paths in `free` take no place."""
        self.app = app
        self.limits = limits
        self.max_concurrency = max_concurrency
        self.active = 0
        self.held = 0  # bytes of bodies
        self._free = free

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._free:
            await self.app(scope, receive, send)
            return
        with ExitStack() as stack:
            try:
                brings_body = self._check(Headers(scope=scope))
                if not brings_body:
                    stack.enter_context(self.place())
            except LookonceError as error:
                await error_response(error)(scope, receive, send)
                return
            body = _Body(self, receive, stack) if brings_body else None
            await self.app(scope, body.receive if body else receive, closing_at_the_end(stack, send))

    def _check(self, headers: Headers) -> bool:
        """Whether a body follows. Raises what its headers alone say against it."""
        declared = headers.get("content-length", "0")
        if not declared.isascii() or not declared.isdigit() or int(declared[:20]) > self.limits.max_bytes:
            raise too_large(self.limits.max_bytes)
        encoding = headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("identity", ""):
            text = "bodies with a content-encoding are not supported: send it as it is"
            raise HttpRefusal(415, "unsupported_media_type", text, param="content-encoding", close=True)
        return int(declared[:20]) > 0 or "transfer-encoding" in headers

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place while it lasts. Raises OVERLOADED."""
        if self.active >= self.max_concurrency:
            raise full("the server is busy: try again")
        self.active += 1
        IN_FLIGHT.inc()
        try:
            yield
        finally:
            self.active -= 1
            IN_FLIGHT.dec()


class _Body:
    """`receive` of one request."""

    def __init__(self, intake: Intake, receive: Receive, stack: ExitStack) -> None:
        self._intake = intake
        self._receive = receive
        self._stack = stack
        self._bytes = 0  # received; they count while the request lasts
        stack.callback(self._release)
        self._waited = 0.0
        self._complete = False

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()
        message = await self._in_time()
        if message["type"] == "http.request":
            self._count(len(message.get("body", b"")))
            if not message.get("more_body", False):
                self._complete = True
                self._stack.enter_context(self._intake.place())
        return message

    async def _in_time(self) -> Message:
        limits = self._intake.limits
        left = limits.silence + self._bytes / limits.rate - self._waited
        began = time.monotonic()
        try:
            async with asyncio.timeout(min(left, limits.silence)):
                return await self._receive()
        except TimeoutError:
            text = (
                f"the request body came too slowly: {limits.silence:g} seconds of silence, or less than {limits.rate} "
                "bytes a second (the gateway's --body-timeout and --body-rate)"
            )
            raise HttpRefusal(408, "request_timeout", text, close=True) from None
        finally:
            self._waited += time.monotonic() - began

    def _release(self) -> None:
        self._intake.held -= self._bytes

    def _count(self, size: int) -> None:
        intake = self._intake
        self._bytes += size
        intake.held += size
        if self._bytes > intake.limits.max_bytes:
            raise too_large(intake.limits.max_bytes)
        if intake.held > intake.limits.total_bytes and self._bytes > SMALL:
            raise full("the server has too many large requests: try again")


def too_large(limit: int) -> LookonceError:
    """For a body over the limit."""
    return HttpRefusal(413, "payload_too_large", f"the request body is larger than {limit} bytes", close=True)


def full(text: str) -> LookonceError:
    """For what there is no room for now."""
    REJECTED.inc()
    return LookonceError(ErrorKind.OVERLOADED, text, retry_after=1.0)


def closing_at_the_end(stack: ExitStack, send: Send) -> Send:
    """`send` that closes `stack` just before the answer's last bytes go out: who has read them all may count on a free
    place and a written log line."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            stack.close()
        await send(message)

    return sending
