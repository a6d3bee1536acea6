"""Which replica serves an image: rendezvous hashing over live endpoints, with an escape when the first is overloaded.
Replicas known by a DNS name follow what it stands for.

The same image goes to the same replica, which holds its prefix KV; a dead replica's images spread over the others and
come back with it. Rendezvous hashing: Thaler and Ravishankar, 1998; bounded loads: Mirrokni et al., 2016.
"""

from __future__ import annotations

import asyncio
import math
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import structlog
from blake3 import blake3

from lookonce.core.errors import ErrorKind, LookonceError, invalid
from lookonce.core.tasks import end_tasks, keep_running, start_task

FIRST_BACKOFF = 0.25  # seconds an endpoint is left out after its first failure; doubles
MAX_BACKOFF = 5.0
LOAD_FACTOR = 1.5  # of the mean load; beyond it a replica counts as overloaded
LOAD_FLOOR = 16  # calls at once that never count as overload
POLL = 0.1
PROBE_SECONDS = 1.0  # that an ejected endpoint gets to say SERVING
REMEMBERED = 300.0
"""Seconds that an endpoint no longer listed is still asked to forget images: it may live on, and come back."""
DNS = "dns://"
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""The addresses ("192.0.2.1", "2001:db8::1") of a host. Raises OSError when they can't be told."""
log = structlog.get_logger(__name__)


class Client(Protocol):
    """What every service client has."""

    address: str

    async def healthy(self, timeout: float = 2.0) -> bool:
        """Whether the service says SERVING."""
        ...

    async def close(self) -> None:
        """Close the channel."""
        ...


C = TypeVar("C", bound=Client)


class Endpoint(Generic[C]):
    """One replica and how it has fared."""

    def __init__(self, client: C) -> None:
        self.client = client
        self.active = 0  # calls under way from this gateway
        self.failures = 0  # in a row
        self.down_until = 0.0  # on the replicas' clock: when it is asked again whether it serves
        self.probe: asyncio.Task[None] | None = None

    @property
    def live(self) -> bool:
        """Whether its last call, or a look at its health since, went well."""
        return not self.failures

    def weight(self, key: bytes) -> int:
        """The rendezvous weight of this endpoint for a key."""
        return int.from_bytes(blake3(self.client.address.encode() + b"\0" + key).digest(8), "little")


class Replicas(Generic[C]):
    """The endpoints of one service."""

    def __init__(self, clients: Sequence[C], *, clock: Callable[[], float] = time.monotonic) -> None:
        self.endpoints = [Endpoint(client) for client in clients]
        self._clock = clock
        self._removed: list[tuple[float, Endpoint[C]]] = []  # with when, on the clock

    def add(self, client: C) -> None:
        """One endpoint more."""
        returned = [item for _, item in self._removed if item.client.address == client.address]
        self.endpoints += returned or [Endpoint(client)]
        self._removed = [(when, item) for when, item in self._removed if item not in returned]

    def remove(self, address: str) -> None:
        """Choose an endpoint no more; calls under way go on."""
        gone = [endpoint for endpoint in self.endpoints if endpoint.client.address == address]
        self.endpoints = [endpoint for endpoint in self.endpoints if endpoint not in gone]
        self._removed += [(self._clock(), endpoint) for endpoint in gone]

    @property
    def remembered(self) -> list[Endpoint[C]]:
        """All endpoints, those removed of late included."""
        return [*self.endpoints, *(endpoint for _, endpoint in self._removed)]

    async def close_idle(self) -> None:
        """Close what was removed a while ago and has no call under way."""
        end = self._clock() - REMEMBERED
        old = [(when, endpoint) for when, endpoint in self._removed if when <= end and not endpoint.active]
        self._removed = [item for item in self._removed if item not in old]
        for _, endpoint in old:
            await endpoint.client.close()

    async def close(self) -> None:
        """Close all clients."""
        await end_tasks(*(endpoint.probe for endpoint in self.remembered if endpoint.probe is not None))
        for endpoint in self.remembered:
            await endpoint.client.close()

    def choose(self, key: bytes, avoid: Endpoint[C] | None = None) -> Endpoint[C]:
        """The endpoint for `key`: live and not overloaded before overloaded before ejected; `avoid` only when alone.

        Raises UNAVAILABLE when there is none at all."""
        if not self.endpoints:
            raise LookonceError(ErrorKind.UNAVAILABLE, "no service is known at the moment", retry_after=1.0)
        if len(self.endpoints) == 1:
            return self.endpoints[0]
        self._probe_ejected()
        capacity = self._capacity()

        def rank(endpoint: Endpoint[C]) -> tuple[bool, bool, bool, int]:
            return (endpoint is avoid, not endpoint.live, endpoint.active >= capacity, -endpoint.weight(key))

        return min(self.endpoints, key=rank)

    @contextmanager
    def use(self, endpoint: Endpoint[C]) -> Iterator[C]:
        """Count a call under way."""
        endpoint.active += 1
        try:
            yield endpoint.client
        finally:
            endpoint.active -= 1

    def failed(self, endpoint: Endpoint[C]) -> None:
        """Leave the endpoint out until it says SERVING. Asked after a pause, longer with each failure in a row."""
        endpoint.down_until = self._clock() + min(FIRST_BACKOFF * 2**endpoint.failures, MAX_BACKOFF)
        endpoint.failures = min(endpoint.failures + 1, 16)

    def succeeded(self, endpoint: Endpoint[C]) -> None:
        """Back in use."""
        endpoint.failures, endpoint.down_until = 0, 0.0

    def any_live(self, avoid: Endpoint[C] | None = None) -> bool:
        """Whether an endpoint other than `avoid` is not ejected."""
        self._probe_ejected()
        return any(endpoint is not avoid and endpoint.live for endpoint in self.endpoints)

    async def health(self, timeout: float = 1.0) -> dict[str, bool]:
        """Whether each endpoint says SERVING, by address; brings those that do back into use."""
        endpoints = list(self.endpoints)
        answers = await asyncio.gather(*(endpoint.client.healthy(timeout) for endpoint in endpoints))
        for endpoint, healthy in zip(endpoints, answers, strict=True):
            if healthy and endpoint.failures:
                self.succeeded(endpoint)
        return {endpoint.client.address: healthy for endpoint, healthy in zip(endpoints, answers, strict=True)}

    async def wait(self, seconds: float) -> bool:
        """Wait until an endpoint says SERVING, at most `seconds`; whether one does."""
        end = self._clock() + seconds
        while True:
            if any((await self.health(timeout=0.5)).values()):
                return True
            if self._clock() + POLL > end:
                return False
            await asyncio.sleep(POLL)

    def _probe_ejected(self) -> None:
        """Have those looked at whose time is up: no request is put at stake for it."""
        for endpoint in self.endpoints:
            if not endpoint.live and endpoint.down_until <= self._clock() and endpoint.probe is None:
                endpoint.probe = start_task(self._probe(endpoint), awaited=False)

    async def _probe(self, endpoint: Endpoint[C]) -> None:
        try:
            if await endpoint.client.healthy(PROBE_SECONDS):
                self.succeeded(endpoint)
            else:
                self.failed(endpoint)
        finally:
            endpoint.probe = None

    def _capacity(self) -> int:
        total = sum(endpoint.active for endpoint in self.endpoints) + 1
        return max(LOAD_FLOOR, math.ceil(LOAD_FACTOR * total / len(self.endpoints)))


@dataclass(frozen=True)
class Name:
    """A host whose every address is an endpoint."""

    host: str
    port: int


async def resolve(host: str, port: int) -> list[str]:
    """The system's resolver, off the event loop."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


def split_targets(targets: Sequence[str]) -> tuple[list[str], list[Name]]:
    """Addresses to be taken as they are, and names to be looked up (dns://HOST:PORT). Raises INVALID_ARGUMENT."""
    fixed = [target for target in targets if not target.startswith(DNS)]
    return fixed, [_parse(target) for target in targets if target.startswith(DNS)]


def open_replicas(
    targets: Sequence[str], connect: Callable[[str, str | None], C], *, interval: float
) -> tuple[Replicas[C], Discovery[C]]:
    """The replicas at these addresses, and what keeps them in step with the names among them. `connect`: see
    `Discovery`. Raises INVALID_ARGUMENT."""
    fixed, names = split_targets(targets)
    replicas = Replicas([connect(address, None) for address in fixed])
    return replicas, Discovery(replicas, names, connect, interval=interval)


def _parse(target: str) -> Name:
    host, colon, port = target.removeprefix(DNS).strip("/").rpartition(":")
    if not host or not colon or "/" in host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise invalid(f"{target!r} must be {DNS}HOST:PORT")
    return Name(host, int(port))


class Discovery(Generic[C]):
    """Keeps the replicas of one service in step with the names it is known by."""

    def __init__(
        self,
        replicas: Replicas[C],
        names: Sequence[Name],
        connect: Callable[[str, str | None], C],
        *,
        interval: float,
        resolve: Resolve = resolve,
    ) -> None:
        """`connect` makes a client of an address ("192.0.2.1:50052") and the name it was found by, which a
        certificate must be for. `interval` is in seconds."""
        self._replicas = replicas
        self._names = tuple(names)
        self._connect = connect
        self._interval = interval
        self._resolve = resolve
        self._found: dict[Name, frozenset[str]] = {}
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Look all names up once, then again in the background. A name that can't be looked up has no endpoints yet."""
        if self._names:
            await self.refresh()
            self._task = keep_running(self._run)

    async def refresh(self) -> None:
        """Look all names up; a name that can't be looked up keeps the endpoints it had."""
        await asyncio.gather(*(self._look_up(name) for name in self._names))

    async def close(self) -> None:
        """Stop looking."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            await self.refresh()
            await self._replicas.close_idle()

    async def _look_up(self, name: Name) -> None:
        try:
            found = frozenset(_address(host, name.port) for host in await self._resolve(name.host, name.port))
        except OSError:
            log.warning(
                "name not resolved, its endpoints stay", name=name.host, endpoints=len(self._found.get(name, ()))
            )
            return
        known = self._found.get(name, frozenset())
        self._found[name] = found
        others = frozenset[str]().union(*(there for other, there in self._found.items() if other != name))
        for address in sorted(found - known - others):
            self._replicas.add(self._connect(address, name.host))
        for address in known - found - others:
            self._replicas.remove(address)
        if found != known:
            log.info("endpoints changed", name=name.host, added=len(found - known), removed=len(known - found))


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
