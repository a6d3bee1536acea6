"""Group commit: writes that wait while one is under way are done together, in one transaction with one sync.

Nobody waits for company: a lone write starts at once, and what has queued by the time it is done goes next, together.
Knows nothing of what is written.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from lookonce.core.tasks import run_in

MAX_TOGETHER = 64
MAX_TOGETHER_BYTES = 8 * 1024**2
"""Writes, and bytes of their values, in one transaction, so that it stays short. A larger value goes alone."""

W = TypeVar("W")


@dataclass(frozen=True, slots=True)
class _Waiting(Generic[W]):
    write: W
    size: int
    future: asyncio.Future[Any]


class GroupCommit(Generic[W]):
    """A queue of writes before `thread`, an executor of one thread, which does them in order.

    `together` does several in one transaction and answers their results, or raises and has changed nothing. Then, and
    when there is only one, `alone` does each in a transaction of its own, so that each has its own outcome.
    """

    def __init__(
        self,
        thread: ThreadPoolExecutor,
        *,
        together: Callable[[list[W]], list[Any]],
        alone: Callable[[W], Any],
    ) -> None:
        self._thread = thread
        self._together = together
        self._alone = alone
        self._lock = threading.Lock()
        self._queue: deque[_Waiting[W]] = deque()
        self._started = False  # the thread is at the queue, or has been told to go there
        self.waiting = 0
        """Writes that are queued or under way."""

    def submit(self, write: W, size: int) -> asyncio.Future[Any]:
        """Queue a write whose value has `size` bytes. It is done even when the future is cancelled."""
        future = asyncio.get_running_loop().create_future()
        with self._lock:
            self._queue.append(_Waiting(write, size, future))
            self.waiting += 1
            start, self._started = not self._started, True
        if start:
            run_in(self._thread, self._work)
        return future

    # in the thread

    def _work(self) -> None:
        while group := self._next():
            outcomes = self._outcomes([waiting.write for waiting in group])
            with self._lock:
                self.waiting -= len(group)  # before they are answered: they may come back at once
            _answer([waiting.future for waiting in group], outcomes)

    def _next(self) -> list[_Waiting[W]]:
        """Those that go together now; none: the thread may leave."""
        group: list[_Waiting[W]] = []
        size = 0
        with self._lock:
            while self._queue and len(group) < MAX_TOGETHER:
                size += self._queue[0].size
                if group and size > MAX_TOGETHER_BYTES:
                    break
                group.append(self._queue.popleft())
            self._started = bool(group)
        return group

    def _outcomes(self, writes: list[W]) -> list[Any]:
        """A result or an exception for each."""
        if len(writes) > 1:
            with contextlib.suppress(Exception):  # whoever is to blame meets it again alone
                return self._together(writes)
        return [self._outcome(write) for write in writes]

    def _outcome(self, write: W) -> Any:
        try:
            return self._alone(write)
        except Exception as error:  # noqa: BLE001 - raised where the write was asked for
            return error


def _answer(futures: list[asyncio.Future[Any]], outcomes: list[Any]) -> None:
    """Wake each event loop once."""
    for loop in {future.get_loop() for future in futures}:
        with contextlib.suppress(RuntimeError):  # closed: nobody waits there any more
            loop.call_soon_threadsafe(_settle, loop, futures, outcomes)


def _settle(loop: asyncio.AbstractEventLoop, futures: list[asyncio.Future[Any]], outcomes: list[Any]) -> None:
    for future, outcome in zip(futures, outcomes, strict=True):
        if future.get_loop() is not loop or future.done():  # done: its caller has gone
            continue
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
