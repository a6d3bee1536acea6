"""What happens around every request, as plain ASGI: an id, a log line, counts, a key, a last resort.

Outermost first: RequestScope, OriginCheck, Intake, Authentication, then the routes.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Iterable
from contextlib import ExitStack
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.auth import DEFAULT_TENANT, Keyring
from gateway.http.error_bodies import CLIENT_GONE, HttpRefusal, error_response, internal_error
from gateway.http.intake import closing_at_the_end
from gateway.metrics import RATE_LIMITED, REQUEST_SECONDS, REQUESTS
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.telemetry import tracing

OPEN_PATHS = frozenset({"/healthz", "/readyz", "/health"})
_SANE_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
log = structlog.get_logger("gateway.access")
_READING = frozenset({"GET", "HEAD"})


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
        route = route_of(scope)
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


def route_of(scope: dict[str, Any] | Any) -> str:
    """The path template of a matched route; never the path itself, which has no bound."""
    route = scope.get("route")
    return str(getattr(route, "path", "")) or "unmatched"


def _presented(headers: Headers) -> str | None:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return key.strip()
    return headers.get("x-api-key") or headers.get("api-key")  # Azure's clients send the latter


class OriginCheck:
    """Refuses requests under names that are not this server's, and those of other sites' pages.

    Without API keys, whoever reaches the socket may ask, and so could the pages of other sites in a browser on this
    machine. Browsers say enough to refuse these: in Host the name that a page was made to point here by, in Origin its
    own."""

    def __init__(
        self, app: ASGIApp, *, hosts: Iterable[str], origins: Iterable[str], free: frozenset[str] = frozenset()
    ) -> None:
        """`hosts`: names and addresses beside the loopback ones, ".example.org" for all below it; `origins`: of pages
        that may call (CORS). Paths in `free` tell nothing and are answered under any name."""
        self.app = app
        self._hosts = frozenset(host.lower().strip("[]") for host in hosts)
        self._origins = frozenset(origins)
        self._free = free

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self._free:
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
