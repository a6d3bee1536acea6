"""Reads one image's bytes, wherever it is, within limits; what passes by itself is tried again."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

from lookonce.core.backoff import Backoff
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.http_fetch.fetch_policy import FetchPolicy
from lookonce.core.http_fetch.fetcher import Fetcher
from lookonce.core.http_fetch.target import FetchError, Reason
from lookonce.core.units import format_size
from lookonce.moderation.batch.sources.filesystems import read_span
from lookonce.moderation.batch.sources.items import FileAt, FileRange, Inline, Item, Unusable, WebUrl

TRIES = 4
FIRST_PAUSE = 0.7  # seconds at most; doubles
_PASSING = {Reason.UNREACHABLE, Reason.BROKEN, Reason.TIMEOUT, Reason.BUSY, Reason.UNRESOLVED}


class Reader:
    """Blocking reads happen in `threads` threads; URLs are fetched within `policy`."""

    def __init__(self, *, threads: int, max_bytes: int, policy: FetchPolicy) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
        self._max_bytes = max_bytes
        self._policy = policy
        self._fetcher: Fetcher | None = None

    async def read(self, item: Item) -> tuple[bytes, float]:
        """The bytes, and the milliseconds it took. Raises what belongs into the row: NOT_FOUND, PERMISSION_DENIED,
        PAYLOAD_TOO_LARGE, INVALID_ARGUMENT, UNAVAILABLE (after several tries)."""
        started = time.perf_counter()
        data = await self._persistently(item)
        if len(data) > self._max_bytes:
            text = f"the file has more than {format_size(self._max_bytes)}"
            raise LookonceError(ErrorKind.PAYLOAD_TOO_LARGE, text, param="image")
        return data, 1000 * (time.perf_counter() - started)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._fetcher is not None:
            self._fetcher.close()

    async def _persistently(self, item: Item) -> bytes:
        backoff = Backoff(FIRST_PAUSE, 2**TRIES * FIRST_PAUSE)
        attempt = 0
        while True:
            attempt += 1
            try:
                return await self._once(item)
            except LookonceError as error:
                error = _for_row(error)
                if error.kind is not ErrorKind.UNAVAILABLE or attempt == TRIES:
                    raise error from None
            await backoff.sleep()

    async def _once(self, item: Item) -> bytes:
        locator = item.locator
        if isinstance(locator, Inline):
            return locator.data
        if isinstance(locator, Unusable):
            raise LookonceError(ErrorKind.INVALID_ARGUMENT, locator.message, param="source")
        if isinstance(locator, WebUrl):
            if self._fetcher is None:
                self._fetcher = Fetcher(self._policy)
            return await self._fetcher.fetch(locator.url, param="url", max_bytes=self._max_bytes)
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._read, locator)

    def _read(self, locator: FileAt | FileRange) -> bytes:
        if isinstance(locator, FileAt):
            return read_span(locator.url, 0, self._max_bytes + 1)
        return read_span(locator.url, locator.offset, min(locator.size, self._max_bytes + 1))


def _for_row(error: LookonceError) -> LookonceError:
    """A failed fetch as a kind of its own: whose fault it is, and whether it may pass."""
    if not isinstance(error, FetchError):
        return error
    if error.reason is Reason.TOO_LARGE:
        return LookonceError(ErrorKind.PAYLOAD_TOO_LARGE, error.message, param="url")
    kind = ErrorKind.UNAVAILABLE if error.reason in _PASSING else ErrorKind.INVALID_ARGUMENT
    return LookonceError(ErrorKind.NOT_FOUND if error.reason is Reason.STATUS else kind, error.message, param="url")
