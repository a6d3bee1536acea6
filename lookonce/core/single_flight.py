"""Single flight: of many who want the same expensive value at once, one makes it and all get it.

Within a process the flight is a task that all callers await; it lives on when the caller that started it goes away. It
is cancelled when the last one does, unless `keep` says that too much is spent on it. Across processes a lease in the
shared store decides who makes; the others poll for the value or for a vacant lease, so a holder that died is replaced
once its lease runs out. Knows nothing of images or encoders.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

import structlog

from lookonce.core.stores.interface import Leases
from lookonce.core.tasks import end_tasks, start_task

How = Literal["hit", "miss", "coalesced"]
"""hit: the store had it; miss: made for this caller; coalesced: made for another caller, here or in another process."""

LEASE_SECONDS = 10.0
"""How long a dead maker blocks the others at most. A live one renews three times as often."""
FIRST_POLL = 0.01
LAST_POLL = 0.1
"""Seconds between two looks of a follower in another process: from the first, growing, to the last."""

V = TypeVar("V")
log = structlog.get_logger(__name__)


@dataclass(eq=False)  # hashed by identity
class Flight(Generic[V]):
    """One value being looked up or made. `label` is the caller's own, for `forget_if`."""

    key: bytes
    label: Hashable
    load: Callable[[], Awaitable[V | None]]
    make: Callable[[], Awaitable[V]]
    save: Callable[[V], Awaitable[object]]
    discard: Callable[[], Awaitable[object]]
    keep: Callable[[], bool]
    owner: bytes = field(default_factory=lambda: os.urandom(16))
    forgotten: bool = False
    saving: bool = False
    settled: asyncio.Event = field(default_factory=asyncio.Event)  # set once nothing more will be written
    task: asyncio.Task[tuple[V, How]] | None = None
    waiters: int = 0


class SingleFlight(Generic[V]):
    """Coordinates makers of values through `leases`. Runs on one event loop."""

    def __init__(
        self,
        leases: Leases,
        *,
        lease_seconds: float = LEASE_SECONDS,
        first_poll: float = FIRST_POLL,
        last_poll: float = LAST_POLL,
    ) -> None:
        self._leases = leases
        self._lease_seconds = lease_seconds
        self._first_poll = first_poll
        self._last_poll = last_poll
        self._joinable: dict[bytes, Flight[V]] = {}
        self._flights: set[Flight[V]] = set()

    async def run(
        self,
        key: bytes,
        *,
        load: Callable[[], Awaitable[V | None]],
        make: Callable[[], Awaitable[V]],
        save: Callable[[V], Awaitable[object]],
        discard: Callable[[], Awaitable[object]],
        keep: Callable[[], bool] = lambda: False,
        label: Hashable = None,
    ) -> tuple[V, How]:
        """The value of `key` and how it came about.

        `load` looks it up in the shared store, `make` makes it, `save` stores it, `discard` removes it from the
        store; `keep` is asked when the last caller goes away: true lets the flight go on, to be saved or joined again.
        Joining a flight under way uses none of them. An exception of any of them reaches every caller of this
        flight and is not kept.
        """
        flight = self._joinable.get(key)
        joined = flight is not None
        if flight is None:
            flight = self._start(Flight(key, label, load, make, save, discard, keep))
        value, how = await self._wait(flight)
        return value, ("coalesced" if joined and how == "miss" else how)

    async def forget(self, key: bytes) -> int:
        """See forget_if; for one key."""
        return await self.forget_if(lambda flight: flight.key == key)

    async def forget_if(self, predicate: Callable[[Flight[V]], bool]) -> int:
        """Erasure: flights that match still answer their callers, but leave nothing in the store.

        Later callers start afresh. Returns how many flights matched, once none of them will write or has left
        anything written.
        """
        matching = [flight for flight in self._flights if predicate(flight)]
        for flight in matching:
            flight.forgotten = True
            if self._joinable.get(flight.key) is flight:
                del self._joinable[flight.key]
        for flight in matching:
            if flight.saving:
                await flight.settled.wait()
        return len(matching)

    @property
    def under_way(self) -> int:
        """Flights that have not ended."""
        return len(self._flights)

    def _start(self, flight: Flight[V]) -> Flight[V]:
        self._joinable[flight.key] = flight
        self._flights.add(flight)
        flight.task = start_task(self._fly(flight))
        flight.task.add_done_callback(lambda task: self._end(flight, task))
        return flight

    async def _wait(self, flight: Flight[V]) -> tuple[V, How]:
        task = flight.task
        if task is None:
            raise RuntimeError("flight was not started")
        flight.waiters += 1
        try:
            return await asyncio.shield(task)
        finally:
            flight.waiters -= 1
            if flight.waiters == 0 and not task.done() and not flight.keep():
                self._leave(flight)
                task.cancel()

    def _end(self, flight: Flight[V], task: asyncio.Task[tuple[V, How]]) -> None:
        self._leave(flight)
        self._flights.discard(flight)
        flight.settled.set()
        if not task.cancelled():
            task.exception()  # retrieved, should every caller have gone away

    def _leave(self, flight: Flight[V]) -> None:
        if self._joinable.get(flight.key) is flight:
            del self._joinable[flight.key]

    async def _fly(self, flight: Flight[V]) -> tuple[V, How]:
        value = await flight.load()
        if value is not None:
            return value, "hit"
        pause = self._first_poll
        while not await self._leases.acquire(flight.key, flight.owner, self._lease_seconds):
            await asyncio.sleep(pause * random.uniform(0.75, 1.25))
            pause = min(1.5 * pause, self._last_poll)
            value = await flight.load()
            if value is not None:
                return value, "coalesced"
        async with self._held(flight):
            value = await flight.load()  # its maker may have finished just before the lease fell to us
            if value is not None:
                return value, "coalesced"
            value = await flight.make()
            await self._save(flight, value)
            return value, "miss"

    async def _save(self, flight: Flight[V], value: V) -> None:
        if flight.forgotten:
            return
        flight.saving = True
        try:
            await flight.save(value)
        finally:
            if flight.forgotten:
                await flight.discard()
            flight.saving = False
            flight.settled.set()

    @asynccontextmanager
    async def _held(self, flight: Flight[V]) -> AsyncIterator[None]:
        """Renew the lease while the body runs, give it back afterwards (also when cancelled)."""
        renewal = start_task(self._renew(flight), awaited=False)
        try:
            yield
        finally:
            await end_tasks(renewal)
            await self._leases.release(flight.key, flight.owner)

    async def _renew(self, flight: Flight[V]) -> None:
        while True:
            await asyncio.sleep(self._lease_seconds / 3)
            if not await self._leases.acquire(flight.key, flight.owner, self._lease_seconds):
                log.warning("lease was lost while its holder worked", lease_seconds=self._lease_seconds)
                return
