"""What one API key, or all keys of a tenant, may ask for: requests a minute and at once. Knows nothing of HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lookonce.core.errors import ErrorKind, LookonceError

MINUTE = 60.0


@dataclass(frozen=True)
class Quota:
    """0: no limit."""

    rate: int = 0  # requests a minute
    concurrency: int = 0  # requests at once


class Meter:
    """Holds one key or tenant to its quota. The rate is a token bucket: a minute's requests may come at once after a
    quiet minute, then they come in at the rate."""

    def __init__(self, quota: Quota, *, who: str = "API key", clock: Callable[[], float] = time.monotonic) -> None:
        self.quota = quota
        self._who = who
        self.active = 0
        self._clock = clock
        self._tokens = float(quota.rate)
        self._filled = clock()

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count a request while it lasts. Raises RATE_LIMITED, with the time to wait."""
        if 0 < self.quota.concurrency <= self.active:
            text = f"this {self._who} has {self.active} requests under way, the limit is {self.quota.concurrency}"
            raise LookonceError(ErrorKind.RATE_LIMITED, text, retry_after=1.0)
        self._take()
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1

    def _take(self) -> None:
        rate = self.quota.rate
        if rate <= 0:
            return
        now = self._clock()
        self._tokens = min(float(rate), self._tokens + (now - self._filled) * rate / MINUTE)
        self._filled = now
        if self._tokens < 1.0:
            wait = (1.0 - self._tokens) * MINUTE / rate
            text = f"more than {rate} requests a minute with this API key"
            raise LookonceError(ErrorKind.RATE_LIMITED, text, retry_after=wait)
        self._tokens -= 1.0
