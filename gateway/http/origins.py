"""Without API keys, whoever reaches the socket may ask, and so could the pages of other sites in a browser on this
machine. Browsers say enough to refuse these: in Host the name that a page was made to point here by, in Origin its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.http.error_bodies import HttpRefusal, error_response
from lookonce.core.errors import ErrorKind, LookonceError

_READING = frozenset({"GET", "HEAD"})


class OriginCheck:
    """Refuses requests under names that are not this server's, and those of other sites' pages."""

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
