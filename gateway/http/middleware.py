"""What happens around every request, as plain ASGI: an id, a log line, counts, bounds, a key, a last resort.

Outermost first: RequestScope, OriginCheck, Intake, Authentication, then the routes.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address
from urllib.parse import urlsplit

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.auth import DEFAULT_TENANT, Keyring
from gateway.http.error_bodies import CLIENT_GONE, HttpRefusal, error_response, internal_error
from gateway.metrics import IN_FLIGHT, RATE_LIMITED, REJECTED, REQUEST_SECONDS, REQUESTS
from gateway.settings import GatewaySettings
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.telemetry import tracing

OPEN_PATHS = frozenset({"/healthz", "/readyz", "/health"})
"""They tell nothing: anyone may ask, under any name."""
_TAKE_NO_PLACE = OPEN_PATHS | {"/metrics"}
_SANE_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_READING = frozenset({"GET", "HEAD"})
SMALL = 1 << 16
"""Bytes of a body that is received even while all bodies together are too large."""
log = structlog.get_logger("gateway.access")


class RequestScope:
    """Gives the request its id, trace and state, writes the access log, counts, answers 500 when all else fails."""

    def __init__(self, app: ASGIApp, *, access_log: bool = True) -> None:
        self.app = app
        self.access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        step = tracing.begin(headers.get(tracing.HEADER))
        sent = headers.get("x-request-id", "")
        request_id = sent if _SANE_ID.fullmatch(sent) else "req_" + secrets.token_hex(12)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        started, status = time.perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                answered = MutableHeaders(scope=message)
                answered["x-request-id"] = request_id
                if step.trace is not None:
                    answered[tracing.HEADER] = step.trace.header
            await send(message)

        with ExitStack() as stack:
            stack.callback(lambda: self._account(scope, status, time.perf_counter() - started, step))
            answer = closing_at_the_end(stack, send_with_id)
            try:
                await self.app(scope, receive, answer)
            except asyncio.CancelledError:
                # Only uvicorn cancels, when the time to drain is over. An answer that has begun is cut there.
                log.warning("cut at the end of the grace time", request_id=request_id)
                if status == 0:
                    error = LookonceError(ErrorKind.UNAVAILABLE, "the server is stopping: try again", retry_after=1.0)
                    await error_response(error)(scope, receive, answer)
            except ClientDisconnect:
                log.debug("the client left", request_id=request_id)
            except Exception:
                log.exception("request failed", request_id=request_id)
                if status == 0:
                    await internal_error()(scope, receive, answer)

    def _account(self, scope: Scope, status: int, seconds: float, step: tracing.Step) -> None:
        # The template of a matched route; never the path itself, which has no bound.
        route = getattr(scope.get("route"), "path", "") or "unmatched"
        method = scope["method"] if scope["method"] in _METHODS else "other"
        status = status or CLIENT_GONE
        step.rename(f"{method} {route}")
        step.note(status=status, request_id=scope["state"]["request_id"])
        step.end("internal" if status >= 500 else None)
        REQUESTS.labels(route, method, str(status)).inc()
        REQUEST_SECONDS.labels(route).observe(seconds)
        if self.access_log and route not in OPEN_PATHS:
            state = scope["state"]
            tenant = state["tenant"].name if "tenant" in state else DEFAULT_TENANT
            fields = {"method": method, "route": route, "status": status, "ms": round(seconds * 1000, 2)}
            log.info("request", **fields, request_id=state["request_id"], tenant=tenant)


class OriginCheck:
    """Refuses requests under names that are not this server's, and those of other sites' pages.

    Without API keys, whoever reaches the socket may ask, and so could the pages of other sites in a browser on this
    machine. Browsers say enough to refuse these: in Host the name that a page was made to point here by, in Origin its
    own."""

    def __init__(self, app: ASGIApp, *, hosts: Iterable[str], origins: Iterable[str]) -> None:
        """`hosts`: names and addresses beside the loopback ones, ".example.org" for all below it; `origins`: of pages
        that may call (CORS)."""
        self.app = app
        self._hosts = frozenset(host.lower().strip("[]") for host in hosts)
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            try:
                self._check(scope["method"], Headers(scope=scope))
            except LookonceError as error:
                await error_response(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _check(self, method: str, headers: Headers) -> None:
        host = headers.get("host", "")
        if not self._known(_name(host)):
            text = (
                f"the Host {host[:100]!r} is not a name of this server: without API keys it answers to localhost and "
                "to those in --allowed-hosts or LOOKONCE_GATEWAY_ALLOWED_HOSTS"
            )
            raise LookonceError(ErrorKind.PERMISSION_DENIED, text, param="host")
        if self._foreign(method, host, headers):
            text = (
                "pages of other sites may not call this server: without API keys only those in --cors-origins or "
                "LOOKONCE_GATEWAY_CORS_ORIGINS may"
            )
            raise LookonceError(ErrorKind.PERMISSION_DENIED, text, param="origin")

    def _known(self, name: str) -> bool:
        if name == "localhost" or name.endswith(".localhost") or name in self._hosts:
            return True
        return any(host.startswith(".") and name.endswith(host) for host in self._hosts)

    def _foreign(self, method: str, host: str, headers: Headers) -> bool:
        """Whether a page of another site asks. Following a link to here is no such thing."""
        origin = headers.get("origin")
        if origin is not None:
            return origin not in self._origins and "*" not in self._origins and _place(origin) != _place(f"//{host}")
        if headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
            return False
        return not (method in _READING and headers.get("sec-fetch-mode") == "navigate")


class Cors(CORSMiddleware):
    """Starlette's, with refusals in our shape."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """The answer to a browser that asks before it sends."""
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        refusal = HttpRefusal(400, "cors_refused", "pages of this origin may not call this server", param="origin")
        refused = error_response(refusal)
        refused.headers["vary"] = "Origin"
        return refused


def _name(host: str) -> str:
    """The name or address in a Host header, without its port; "localhost" for all addresses of this machine alone."""
    try:
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""
    try:
        address = ip_address(name)
    except ValueError:
        return name
    return "localhost" if address.is_loopback else str(address)


def _place(url: str) -> tuple[str, int | None] | None:
    """Name and port; the ports that browsers leave out are None."""
    try:
        parts = urlsplit(url)
        return (parts.hostname or "", None if parts.port in (80, 443) else parts.port)
    except ValueError:
        return None


class Intake:
    """What a request may bring: a body, bounded in bytes and in time and together with all others' before anything
    parses it, and a place among the requests that are worked on. The place is taken once the body is there: whoever
    sends slowly keeps nobody else from one."""

    def __init__(self, app: ASGIApp, settings: GatewaySettings) -> None:
        self.app = app
        self.settings = settings
        self.active = 0
        self.held = 0  # bytes of bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _TAKE_NO_PLACE:
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
        if not declared.isascii() or not declared.isdigit() or int(declared[:20]) > self.settings.max_body_bytes:
            raise _too_large(self.settings)
        encoding = headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("identity", ""):
            text = "bodies with a content-encoding are not supported: send it as it is"
            raise HttpRefusal(415, "unsupported_media_type", text, param="content-encoding", close=True)
        return int(declared[:20]) > 0 or "transfer-encoding" in headers

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place while it lasts. Raises OVERLOADED."""
        if self.active >= self.settings.max_concurrency:
            raise _full("the server is busy: try again")
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
        silence, rate = self._intake.settings.body_timeout, self._intake.settings.body_rate
        left = silence + self._bytes / rate - self._waited  # a slow body has `silence` more than it would take
        began = time.monotonic()
        try:
            async with asyncio.timeout(min(left, silence)):
                return await self._receive()
        except TimeoutError:
            text = (
                f"the request body came too slowly: {silence:g} seconds of silence, or less than {rate} "
                "bytes a second (the gateway's --body-timeout and --body-rate)"
            )
            raise HttpRefusal(408, "request_timeout", text, close=True) from None
        finally:
            self._waited += time.monotonic() - began

    def _release(self) -> None:
        self._intake.held -= self._bytes

    def _count(self, size: int) -> None:
        intake, settings = self._intake, self._intake.settings
        self._bytes += size
        intake.held += size
        if self._bytes > settings.max_body_bytes:
            raise _too_large(settings)
        if intake.held > max(settings.max_bodies_bytes, settings.max_body_bytes) and self._bytes > SMALL:
            raise _full("the server has too many large requests: try again")


def _too_large(settings: GatewaySettings) -> LookonceError:
    text = f"the request body is larger than {settings.max_body_bytes} bytes"
    return HttpRefusal(413, "payload_too_large", text, close=True)


def _full(text: str) -> LookonceError:
    REJECTED.inc()
    return LookonceError(ErrorKind.OVERLOADED, text, retry_after=1.0)


class Authentication:
    """Every route but the three health ones and the playground's files needs a key, and is held to the key's quota; the
    tenant goes into the request's state."""

    def __init__(self, app: ASGIApp, keyring: Keyring) -> None:
        self.app = app
        self.keyring = keyring

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] != "OPTIONS" and not _is_open(scope["path"]):
            with ExitStack() as held:
                try:
                    owner = self.keyring.identify(_presented(Headers(scope=scope)))
                    scope["state"]["tenant"] = owner.tenant
                    held.enter_context(owner.request())
                except LookonceError as error:
                    RATE_LIMITED.inc(error.kind is ErrorKind.RATE_LIMITED)
                    await error_response(error)(scope, receive, send)
                    return
                await self.app(scope, receive, closing_at_the_end(held, send))
            return
        await self.app(scope, receive, send)


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path == "/" or path.startswith("/playground/")


def _presented(headers: Headers) -> str | None:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return key.strip()
    return headers.get("x-api-key") or headers.get("api-key")  # Azure's clients send the latter


def closing_at_the_end(stack: ExitStack, send: Send) -> Send:
    """`send` that closes `stack` just before the answer's last bytes go out: who has read them all may count on a free
    place and a written log line."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            stack.close()
        await send(message)

    return sending
