"""Fetches what clients' URLs lead to, within an operator's rules. Knows nothing of images or of our own routes."""

from __future__ import annotations

import asyncio
import ssl
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

import httpcore2
import structlog
from prometheus_client import Counter

from lookonce.core.http_fetch.fetch_policy import FetchPolicy
from lookonce.core.http_fetch.pinned_connection import LookUp, Resolver, get, system_look_up, tls_context
from lookonce.core.http_fetch.target import FetchError, Reason, Target, follow, parse_target
from lookonce.core.units import format_size

FETCHES = Counter("lookonce_gateway_fetches", "URLs fetched for clients, by what came of it.", ("outcome",))
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_IMAGE_TYPES = ("image/", "application/octet-stream", "binary/octet-stream")
log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Wanted:
    """A URL, and the field of the request that it came in."""

    url: str
    param: str


class Allowance:
    """Bytes that the fetches of one request may have together."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._left = limit

    def take(self, size: int, param: str, host: str) -> None:
        """Raises FetchError when there are not as many left."""
        self._left -= size
        if self._left < 0:
            text = f"the images at URLs have more bytes together than the {format_size(self._limit)} left to them"
            raise FetchError(Reason.TOO_LARGE, text, param=param, host=host)


class Fetcher:
    """The one way from a client's URL to bytes. Raises INVALID_ARGUMENT for a bad file of roots.

    `look_up` takes the name server's place, `tls` that of the policy's roots."""

    def __init__(
        self, policy: FetchPolicy, *, look_up: LookUp = system_look_up, tls: ssl.SSLContext | None = None
    ) -> None:
        self._policy = policy
        self._resolver = Resolver(policy, look_up)
        self._slots = asyncio.Semaphore(policy.concurrency)
        self._shares: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(policy.per_owner))
        self._context = tls or tls_context(policy)

    async def fetch(self, url: str, *, param: str, max_bytes: int, owner: str = "") -> bytes:
        """What the URL leads to, at most `max_bytes`. Raises FetchError."""
        wanted = [Wanted(url, param)]
        return (await self.fetch_all(wanted, max_bytes=max_bytes, total_bytes=max_bytes, owner=owner))[0]

    async def fetch_all(
        self, wanted: Sequence[Wanted], *, max_bytes: int, total_bytes: int, owner: str = ""
    ) -> list[bytes]:
        """The files in the order wanted, each at most `max_bytes`, all together at most `total_bytes`; equal URLs are
        fetched once. No connection is made unless all URLs are well-formed and allowed. The first failure ends the
        other fetches; raises FetchError.

        `owner` is on whose behalf: one of a known few, none of whom gets more than a share of the slots."""
        targets = [self._read(item) for item in wanted]
        share = self._shares[owner]
        first = {target: item.param for target, item in zip(reversed(targets), reversed(wanted), strict=True)}
        allowance, slots = Allowance(total_bytes), asyncio.Semaphore(self._policy.per_request)

        async def one(target: Target, param: str) -> bytes:
            async with slots:
                return await self._counted(target, param, max_bytes, allowance, share)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = {target: group.create_task(one(target, param)) for target, param in first.items()}
        except ExceptionGroup as failures:
            fetch_errors, others = failures.split(FetchError)
            if fetch_errors is None or others is not None:
                raise
            raise fetch_errors.exceptions[0] from failures
        return [tasks[target].result() for target in targets]

    def close(self) -> None:
        """Look no more names up."""
        self._resolver.close()

    def _read(self, item: Wanted) -> Target:
        try:
            target = parse_target(item.url, item.param)
            self._policy.check(target, item.param)
        except FetchError as error:
            _note(error)
            raise
        return target

    async def _counted(
        self, target: Target, param: str, max_bytes: int, allowance: Allowance, share: asyncio.Semaphore
    ) -> bytes:
        try:
            async with AsyncExitStack() as held:
                await self._admit(held, share, param)
                data = await self._timed(target, param, max_bytes, allowance)
        except FetchError as error:
            _note(error)
            raise
        FETCHES.labels("ok").inc()
        return data

    async def _admit(self, held: AsyncExitStack, share: asyncio.Semaphore, param: str) -> None:
        """Wait for a slot of the owner's and then for one of all: who has used up a share keeps nobody waiting."""
        try:
            async with asyncio.timeout(self._policy.timeout):
                await held.enter_async_context(share)
                await held.enter_async_context(self._slots)
        except TimeoutError as error:
            raise FetchError(Reason.BUSY, "too many URLs are being fetched, try again", param=param) from error

    async def _timed(self, target: Target, param: str, max_bytes: int, allowance: Allowance) -> bytes:
        """Within the policy's time; what a library raises as a FetchError."""
        try:
            async with asyncio.timeout(self._policy.timeout):
                return await self._follow(target, param, max_bytes, allowance)
        except httpcore2.ConnectError as error:
            text = f"the host of '{param}' could not be reached"
            raise FetchError(Reason.UNREACHABLE, text, param=param, host=target.host) from error
        except (TimeoutError, httpcore2.TimeoutException) as error:
            text = f"the server of '{param}' took too long"
            raise FetchError(Reason.TIMEOUT, text, param=param, host=target.host) from error
        except (httpcore2.NetworkError, httpcore2.ProtocolError, OSError) as error:
            text = f"the server of '{param}' broke off or sent no valid HTTP"
            raise FetchError(Reason.BROKEN, text, param=param, host=target.host) from error

    async def _follow(self, target: Target, param: str, max_bytes: int, allowance: Allowance) -> bytes:
        """GET, and go where it redirects: each hop is read, checked and looked up like the first."""
        for _ in range(self._policy.max_redirects + 1):
            addresses = await self._resolver.addresses(target, param)
            async with get(target, addresses, self._policy, self._context) as response:
                if response.status not in _REDIRECTS:
                    return await _body(response, target, param, max_bytes, allowance)
                location = _header(response, b"location")
            target = self._next(target, location, param)
        text = f"'{param}' redirects more than {self._policy.max_redirects} times"
        raise FetchError(Reason.REDIRECTS, text, param=param, host=target.host)

    def _next(self, target: Target, location: str, param: str) -> Target:
        try:
            hop = follow(target, location, param)
            if target.scheme == "https" and hop.scheme != "https":
                raise FetchError(Reason.DOWNGRADE, "", param=param, host=hop.host)
            self._policy.check(hop, param)
        except FetchError as error:  # one text: where a server of theirs redirects is not ours to describe
            text = f"'{param}' redirects to where this server does not fetch from"
            raise FetchError(error.reason, text, param=param, host=error.host) from error
        return hop


async def _body(
    response: httpcore2.Response, target: Target, param: str, max_bytes: int, allowance: Allowance
) -> bytes:
    """The bytes of a good answer, counted as they come: nothing is believed of how many there will be."""
    _check_head(response, target, param)
    if _declared(response) > max_bytes:
        raise _too_large(param, target.host, max_bytes)
    data = bytearray()
    async for piece in response.aiter_stream():
        if len(data) + len(piece) > max_bytes:
            raise _too_large(param, target.host, max_bytes)
        allowance.take(len(piece), param, target.host)
        data += piece
    if not data:
        raise FetchError(Reason.EMPTY, f"the server of '{param}' sent an empty file", param=param, host=target.host)
    return bytes(data)


def _check_head(response: httpcore2.Response, target: Target, param: str) -> None:
    if response.status != 200:
        text = f"the server of '{param}' answered with status {response.status}"
        raise FetchError(Reason.STATUS, text, param=param, host=target.host)
    if _header(response, b"content-encoding").lower() not in ("", "identity"):
        text = f"the server of '{param}' sent its answer compressed"
        raise FetchError(Reason.ENCODED, text, param=param, host=target.host)
    kind = _header(response, b"content-type").lower()
    if kind and not kind.startswith(_IMAGE_TYPES):
        text = f"the server of '{param}' sent something else than an image (by its content type)"
        raise FetchError(Reason.NOT_AN_IMAGE, text, param=param, host=target.host)


def _header(response: httpcore2.Response, name: bytes) -> str:
    """All of the header's values, "" without it. Bytes beyond ASCII are percent-encoded by `follow` if at all."""
    values = [value for key, value in response.headers if key.lower() == name]
    return b", ".join(values).decode("utf-8", "replace").strip()


def _declared(response: httpcore2.Response) -> int:
    text = _header(response, b"content-length")
    return int(text) if text.isascii() and text.isdigit() else 0


def _too_large(param: str, host: str, limit: int) -> FetchError:
    text = f"the image at '{param}' has more than {format_size(limit)}"
    return FetchError(Reason.TOO_LARGE, text, param=param, host=host)


def _note(error: FetchError) -> None:
    FETCHES.labels(error.reason.value).inc()
    log.info("URL not fetched", reason=error.reason.value, host=error.host)
