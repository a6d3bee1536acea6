"""The thread that encodes: one forward after the other, and a turn for another one wherever a long forward pauses.

All forwards share one thread, because OpenMP keeps a team of threads for each that computes
(lookonce/models/omp_thread.py). Knows nothing of images.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from lookonce.models.omp_thread import Pause

R = TypeVar("R")
CLOSE_SECONDS = 5.0
"""How long `close` waits for the forward under way to reach its next pause; the thread ends with the process."""


class Stopped(Exception):
    """The thread is being closed: a forward was given up halfway."""


class EncodeThread(Generic[R]):
    """Begins at once; `run` is called on an event loop."""

    def __init__(self) -> None:
        self._waiting: SimpleQueue[tuple[Callable[[Pause], R], Future[R]] | None] = SimpleQueue()
        self._closing = threading.Event()
        self._ended: Future[None] = Future()
        self._within = False  # a forward runs in another's pause
        # No executor's thread: the end of the process would wait for it.
        threading.Thread(target=self._serve, name="encode", daemon=True).start()

    async def run(self, work: Callable[[Pause], R]) -> R:
        """The result of `work(pause)`, or its exception; Stopped when the thread closes first."""
        if self._closing.is_set():
            raise Stopped
        future: Future[R] = Future()
        self._waiting.put((work, future))
        return await asyncio.wrap_future(future)

    async def close(self) -> None:
        """Give up what is under way at its next pause; returns when the thread has ended, or after CLOSE_SECONDS."""
        self._closing.set()
        self._waiting.put(None)
        await asyncio.wait([asyncio.wrap_future(self._ended)], timeout=CLOSE_SECONDS)

    def _serve(self) -> None:
        while (job := self._waiting.get()) is not None:
            self._do(*job)
        self._ended.set_result(None)

    def _do(self, work: Callable[[Pause], R], future: Future[R]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            if self._closing.is_set():
                raise Stopped
            future.set_result(work(self._pause))
        except BaseException as error:  # noqa: BLE001 - the edge of the thread: whoever waits gets it
            future.set_exception(error)

    def _pause(self) -> None:
        if self._closing.is_set():
            raise Stopped
        if self._within:
            return
        try:
            job = self._waiting.get_nowait()
        except Empty:
            return
        if job is None:
            self._waiting.put(None)
            raise Stopped
        self._within = True
        try:
            self._do(*job)
        finally:
            self._within = False
