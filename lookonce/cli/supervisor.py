"""Runs several services as one system: all up or a clear failure; drained in order at the end.

The order of `services` is the order in which they are drained: those that send requests before those that answer them.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Sequence
from typing import Any

from lookonce.cli.service_process import Service, ServiceFailed
from lookonce.core.tasks import start_task

FORCED_EXIT = 130
_KILL_MARGIN = 3.0  # seconds beyond its own grace that a service gets before SIGKILL
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Supervisor:
    """`on_ready` is called once, when every service is ready for the first time."""

    def __init__(self, services: Sequence[Service], *, grace: float, on_ready: Callable[[], None]) -> None:
        self.services = services
        self.grace = grace
        self._on_ready = on_ready
        self._stop = asyncio.Event()
        self._forced = False

    async def run(self) -> int:
        """Supervise until a signal; the process's exit status. Raises ServiceFailed when a service can't be started."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._signalled)
        keepers: set[asyncio.Task[Any]] = {start_task(service.keep_running()) for service in self.services}
        others: set[asyncio.Task[Any]] = {start_task(self._announce()), start_task(self._stop.wait())}
        try:
            await self._until_over(keepers, others)
        finally:
            await self._shut_down(keepers | others)
            for number in _SIGNALS:
                loop.remove_signal_handler(number)
        return FORCED_EXIT if self._forced else 0

    async def _until_over(self, keepers: set[asyncio.Task[Any]], others: set[asyncio.Task[Any]]) -> None:
        pending: set[asyncio.Task[Any]] = {*keepers, *others}
        while pending and not self._stop.is_set():
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # raises ServiceFailed

    async def _announce(self) -> None:
        for service in self.services:
            await service.ready.wait()
        self._on_ready()

    async def _shut_down(self, tasks: set[asyncio.Task[Any]]) -> None:
        for service in self.services:
            await service.stop(0.0 if self._forced else self.grace + _KILL_MARGIN)
        for task in tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, ServiceFailed):
                await task
        for service in self.services:
            service.close()

    def _signalled(self) -> None:
        if self._stop.is_set():
            self._forced = True
            for service in self.services:
                service.send(signal.SIGKILL)
        self._stop.set()
