"""Single flight: of many who want the same expensive value at once, one makes it and all get it.

Within a process the flight is a task that all callers await; it lives on when the caller that started it goes away. It
is cancelled when the last one does, unless `keep` says that too much is spent on it. Across processes a lease in the
shared store decides who makes; the others poll for the value or for a vacant lease, so a holder that died is replaced
once its lease runs out. Knows nothing of images or encoders.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Hashable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Literal, TypeVar

import structlog

from lookonce.core.backoff import Backoff
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


class Abandoned(Exception):
    """The value is not made any more: the flight was ended, not its caller."""


@dataclass(eq=False)  # hashed by identity
class Shared(Generic[V]):
    """What all who want one value wait for. `label` is the first caller's own."""

    key: Hashable
    label: Any
    keep: Callable[[], bool]
    task: asyncio.Task[V]
    waiters: int = 0


class Flights(Generic[V]):
    """Single flight within a process. Runs on one event loop."""

    def __init__(self) -> None:
        self._joinable: dict[Hashable, Shared[V]] = {}
        self._flights: set[Shared[V]] = set()

    def __len__(self) -> int:
        return len(self._flights)

    async def run(
        self,
        key: Hashable,
        make: Callable[[], Coroutine[Any, Any, V]],
        *,
        keep: Callable[[], bool] = lambda: False,
        label: Any = None,
    ) -> tuple[V, bool]:
        """The value of `key`, and whether another caller had begun to make it. Raises what `make` raises, to every
        caller of the flight, and Abandoned."""
        flight = self._joinable.get(key)
        joined = flight is not None
        if flight is None:
            flight = Shared(key, label, keep, start_task(make()))
            self._joinable[key] = flight
            self._flights.add(flight)
            flight.task.add_done_callback(partial(self._landed, flight))
        return await self._wait(flight), joined

    def matching(self, predicate: Callable[[Shared[V]], bool]) -> list[Shared[V]]:
        """Flights that have not ended."""
        return [flight for flight in self._flights if predicate(flight)]

    def leave(self, flight: Shared[V]) -> None:
        """Let nobody join it any more: later callers start afresh."""
        if self._joinable.get(flight.key) is flight:
            del self._joinable[flight.key]

    async def end(self, flights: Sequence[Shared[V]]) -> None:
        """Cancel them, and wait until they have ended. Their callers get Abandoned."""
        for flight in flights:
            self.leave(flight)
        await end_tasks(*(flight.task for flight in flights))

    async def _wait(self, flight: Shared[V]) -> V:
        task = flight.task
        flight.waiters += 1
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if task.cancelled() and caller is not None and not caller.cancelling():
                raise Abandoned from None
            raise
        finally:
            flight.waiters -= 1
            if flight.waiters == 0 and not task.done() and not flight.keep():
                self.leave(flight)
                task.cancel()

    def _landed(self, flight: Shared[V], task: asyncio.Task[V]) -> None:
        self.leave(flight)
        self._flights.discard(flight)
        if not task.cancelled():
            task.exception()  # retrieved, should every caller have gone away


@dataclass(eq=False)
class Flight(Generic[V]):
    """One value being looked up or made. `label` is the caller's own, for `forget_if`."""

    key: bytes
    label: Hashable
    load: Callable[[], Awaitable[V | None]]
    make: Callable[[], Awaitable[V]]
    save: Callable[[V], Awaitable[object]]
    discard: Callable[[], Awaitable[object]]
    owner: bytes = field(default_factory=lambda: os.urandom(16))
    forgotten: bool = False
    saving: bool = False
    settled: asyncio.Event = field(default_factory=asyncio.Event)  # set once nothing more will be written


class SingleFlight(Generic[V]):
    """Single flight across processes: makers of values in a store, coordinated through `leases`."""

    def __init__(self, leases: Leases, *, lease_seconds: float = LEASE_SECONDS) -> None:
        self._leases = leases
        self._lease_seconds = lease_seconds
        self._flights: Flights[tuple[V, How]] = Flights()

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
        flight = Flight(key, label, load, make, save, discard)
        (value, how), joined = await self._flights.run(key, lambda: self._fly(flight), keep=keep, label=flight)
        return value, ("coalesced" if joined and how == "miss" else how)

    async def forget_if(self, predicate: Callable[[Flight[V]], bool]) -> int:
        """Erasure: flights that match still answer their callers, but leave nothing in the store.

        Later callers start afresh. Returns how many flights matched, once none of them will write or has left
        anything written.
        """
        matching = self._flights.matching(lambda shared: predicate(shared.label))
        for shared in matching:
            shared.label.forgotten = True
            self._flights.leave(shared)
        for shared in matching:
            if shared.label.saving:
                await shared.label.settled.wait()
        return len(matching)

    @property
    def under_way(self) -> int:
        """Flights that have not ended."""
        return len(self._flights)

    async def _fly(self, flight: Flight[V]) -> tuple[V, How]:
        value = await flight.load()
        if value is not None:
            return value, "hit"
        backoff = Backoff(FIRST_POLL, LAST_POLL, factor=1.5)
        while not await self._leases.acquire(flight.key, flight.owner, self._lease_seconds):
            await backoff.sleep()
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
