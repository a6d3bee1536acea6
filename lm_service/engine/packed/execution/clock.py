"""How long forwards take. On a GPU a call returns when its kernels are queued: there its own events tell the time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch


class WallClock:
    """Seconds within its `with` blocks."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds += time.perf_counter() - self._began


class EventClock:
    """The same of what a GPU did for them, by pairs of events: asked for later, so that nobody waits."""

    def __init__(self, event: Callable[[], Any], stream: Callable[[], Any] = lambda: None) -> None:
        """`event`: makes one that can be timed (torch.cuda.Event); `stream`: what the forwards are queued in."""
        self._event, self._stream = event, stream
        self._pairs: deque[tuple[Any, Any]] = deque()
        self._seconds = 0.0

    @property
    def seconds(self) -> float:
        """Of the blocks whose work is done."""
        while self._pairs and self._pairs[0][1].query():
            begin, end = self._pairs.popleft()
            self._seconds += begin.elapsed_time(end) / 1000
        return self._seconds

    def __enter__(self) -> None:
        self._begin = self._event()
        self._begin.record(self._stream())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            end = self._event()
            end.record(self._stream())
            self._pairs.append((self._begin, end))
            _ = self.seconds  # those that are done go: as many are kept as steps are under way


def work_clock(device: torch.device) -> WallClock | EventClock:
    """That of a model's first device."""
    if device.type == "cuda":

        def event() -> Any:
            with torch.cuda.device(device):
                return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

        return EventClock(event, lambda: torch.cuda.current_stream(device))
    return WallClock()
