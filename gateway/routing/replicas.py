"""Which replica serves an image: rendezvous hashing over live endpoints, with an escape when the first is overloaded.

The same image goes to the same replica, which holds its prefix KV; a dead replica's images spread over the others and
come back with it. Rendezvous hashing: Thaler and Ravishankar, 1998; bounded loads: Mirrokni et al., 2016.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

from blake3 import blake3

from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.tasks import end_tasks, start_task

FIRST_BACKOFF = 0.25  # seconds an endpoint is left out after its first failure; doubles
MAX_BACKOFF = 5.0
LOAD_FACTOR = 1.5  # of the mean load; beyond it a replica counts as overloaded
LOAD_FLOOR = 16  # calls at once that never count as overload
POLL = 0.1
PROBE_SECONDS = 1.0  # that an ejected endpoint gets to say SERVING
REMEMBERED = 300.0
"""Seconds that an endpoint no longer listed is still asked to forget images: it may live on, and come back."""


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
