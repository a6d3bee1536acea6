"""Pauses between attempts, by tenacity: longer each time, and random, so that those who failed together come apart."""

from __future__ import annotations

import asyncio

import tenacity


class Backoff:
    """Of one work that is tried again and again: `sleep` after each attempt that failed."""

    def __init__(self, first: float, last: float, *, factor: float = 2.0) -> None:
        """Seconds: a pause is at least half of `first`. The most it can be grows by `factor` from `first` to `last`."""
        self._wait = tenacity.wait_random_exponential(multiplier=first, max=last, exp_base=factor, min=first / 2)
        self._state = tenacity.RetryCallState(tenacity.AsyncRetrying(), None, (), {})
        self._last = last

    async def sleep(self, told: float | None = None) -> None:
        """The next pause; `told`, the seconds that whoever refused asked for, come on top, as far as `last`."""
        pause = self._wait(self._state)
        self._state.attempt_number += 1
        await asyncio.sleep(min(told or 0.0, self._last) + pause)
