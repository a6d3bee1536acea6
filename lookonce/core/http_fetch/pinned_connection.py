"""From a host to one connection for one request: looked up once, every address checked, connected to what was checked.

So a name that resolves anew to another address gains nothing (DNS rebinding). TLS still asks for, and verifies, the
name in the URL.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from ipaddress import ip_address

import httpcore2

from lookonce.core.errors import invalid
from lookonce.core.http_fetch.fetch_policy import FetchPolicy, may_connect
from lookonce.core.http_fetch.target import Address, Reason, Target, no_usable_address
from lookonce.core.version import __version__

LookUp = Callable[[str, int], Sequence[str]]
"""Blocking: addresses of a host and port as text. Raises OSError for an unknown name."""
_THREADS = 8


def system_look_up(host: str, port: int) -> Sequence[str]:
    """Ask the system's resolver."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return tuple(dict.fromkeys(str(entry[4][0]) for entry in found))


class Resolver:
    """Looks names up in threads of its own: a slow name server stalls neither the event loop nor other work."""

    def __init__(self, policy: FetchPolicy, look_up: LookUp = system_look_up) -> None:
        self._policy = policy
        self._look_up = look_up
        self._threads = ThreadPoolExecutor(_THREADS, "look-up")

    async def addresses(self, target: Target, param: str) -> tuple[Address, ...]:
        """Where to connect. Raises FetchError when there is none, or when any one is not allowed: a name with a public
        and a private address is an attempt, not a choice."""
        if target.address is not None:
            found: tuple[Address, ...] = (target.address,)
        else:
            found = await self._named(target, param)
        if not all(may_connect(address, self._policy.networks) for address in found):
            raise no_usable_address(Reason.PRIVATE_ADDRESS, param, target.host)
        return found

    async def _named(self, target: Target, param: str) -> tuple[Address, ...]:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._policy.connect_timeout):
                texts = await loop.run_in_executor(self._threads, self._look_up, target.host, target.port)
            found = tuple(ip_address(text) for text in texts)
        except (OSError, ValueError) as error:  # TimeoutError is an OSError, UnicodeError a ValueError
            raise no_usable_address(Reason.UNRESOLVED, param, target.host) from error
        if not found:
            raise no_usable_address(Reason.UNRESOLVED, param, target.host)
        return found

    def close(self) -> None:
        """Take no more names."""
        self._threads.shutdown(wait=False, cancel_futures=True)


USER_AGENT = f"lookonce/{__version__}"
_MAX_ADDRESSES = 4


class PinnedBackend(httpcore2.AsyncNetworkBackend):
    """Connects to the given addresses, in order, whatever host it is asked for."""

    def __init__(self, addresses: Sequence[Address]) -> None:
        self._addresses = addresses[:_MAX_ADDRESSES]
        self._inner = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """A stream to the first address that answers, `timeout` seconds for all of them. Raises ConnectError."""
        deadline = None if timeout is None else time.monotonic() + timeout
        failure: Exception = httpcore2.ConnectError("no address")
        for address in self._addresses:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                return await self._inner.connect_tcp(str(address), port, timeout=left)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        raise failure

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None
    ) -> httpcore2.AsyncNetworkStream:
        """Never: raises ConnectError."""
        raise httpcore2.ConnectError("unix sockets are no place to fetch from")

    async def sleep(self, seconds: float) -> None:
        await self._inner.sleep(seconds)


def tls_context(policy: FetchPolicy) -> ssl.SSLContext:
    """Verifies certificates against the system's roots, and the operator's. Raises INVALID_ARGUMENT for a bad file."""
    context = httpcore2.default_ssl_context()
    if policy.ca is not None:
        try:
            context.load_verify_locations(cafile=policy.ca)
        except OSError as error:  # ssl.SSLError is one
            raise invalid(f"--fetch-ca {policy.ca}: no readable PEM certificates") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


@asynccontextmanager
async def get(
    target: Target, addresses: Sequence[Address], policy: FetchPolicy, context: ssl.SSLContext
) -> AsyncIterator[httpcore2.Response]:
    """One GET, its answer streaming. No proxy, no cookies, no credentials, no redirect, nothing from the environment.

    Raises httpcore2's errors."""
    url = httpcore2.URL(scheme=target.scheme, host=target.host, port=target.port, target=target.path)
    connection = httpcore2.AsyncHTTPConnection(
        url.origin, ssl_context=context, network_backend=PinnedBackend(addresses)
    )
    request = httpcore2.Request(
        "GET",
        url,
        headers={
            "Host": target.authority,
            "User-Agent": USER_AGENT,
            "Accept": "image/*",
            "Accept-Encoding": "identity",
            "Connection": "close",
        },
        extensions={
            "timeout": {
                "connect": policy.connect_timeout,
                "read": policy.read_timeout,
                "write": policy.read_timeout,
            }
        },
    )
    try:
        response = await connection.handle_async_request(request)
        try:
            yield response
        finally:
            await response.aclose()
    finally:
        await connection.aclose()
