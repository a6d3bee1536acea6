"""Images to a language service: those that wait at the same time go in one call, which costs less than one each."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.rpc.client import LanguageClient
from lookonce.core.tasks import end_tasks, start_task
from protos.lookonce.v1 import language_pb2

_CALLS = 2
"""Under way at once: the service has the next when it is done with one."""
_MOST_ITEMS = 512
"""Of one call with more than one image; the service takes 1,024."""
Items = Sequence[language_pb2.ScoreItem]
Results = list[language_pb2.ScoreResult]


class ScoreCalls:
    """`score` is called once for each image, from any number of tasks."""

    def __init__(self, client: LanguageClient, images: int, *, isolated: bool, timeout: float) -> None:
        """At most about `images` are with the service; `timeout` is that of a call, in seconds. `isolated`: nothing
        scored beside an image may change its scores, whatever call it comes in."""
        self._client = client
        self._images = -(-images // _CALLS)
        self._calls = min(_CALLS, images)
        self._isolated = isolated
        self._timeout = timeout
        self._waiting: deque[tuple[Items, asyncio.Future[Results]]] = deque()
        self._under_way: set[asyncio.Task[None]] = set()

    async def score(self, items: Items) -> Results:
        """Results in the order of `items`. Raises what the call raises."""
        future: asyncio.Future[Results] = asyncio.get_running_loop().create_future()
        self._waiting.append((items, future))
        self._send()
        return await future

    async def close(self) -> None:
        """Give up what is under way."""
        calls = list(self._under_way)
        await end_tasks(*calls)

    def _send(self) -> None:
        while self._waiting and len(self._under_way) < self._calls:
            call = start_task(self._call(self._take()))
            self._under_way.add(call)
            call.add_done_callback(self._ended)

    def _ended(self, call: asyncio.Task[None]) -> None:
        self._under_way.discard(call)
        if not call.cancelled():
            self._send()

    def _take(self) -> list[tuple[Items, asyncio.Future[Results]]]:
        taken = [self._waiting.popleft()]
        count = len(taken[0][0])
        while self._waiting and len(taken) < self._images and count + len(self._waiting[0][0]) <= _MOST_ITEMS:
            taken.append(self._waiting.popleft())
            count += len(taken[-1][0])
        return taken

    async def _call(self, batch: Sequence[tuple[Items, asyncio.Future[Results]]]) -> None:
        wanted = [(items, future) for items, future in batch if not future.done()]  # others have gone meanwhile
        if not wanted:
            return
        # `alone`: services of the last release know it by that name
        request = language_pb2.ScoreRequest(timeout=self._timeout, isolated=self._isolated, alone=self._isolated)
        for items, _ in wanted:
            request.items.extend(items)
        try:
            response = await self._client.score(request, timeout=self._timeout + 1)
            if len(response.results) != len(request.items):
                raise LookonceError(ErrorKind.INTERNAL, "the language service answered with another number of results")
            at = 0
            for items, future in wanted:
                if not future.done():
                    future.set_result(list(response.results[at : at + len(items)]))
                at += len(items)
        except LookonceError as error:
            for _, future in wanted:
                if not future.done():
                    future.set_exception(LookonceError(error.kind, error.message, retry_after=error.retry_after))
        except Exception as error:  # whatever it is, those who wait are told
            for _, future in wanted:
                if not future.done():
                    future.set_exception(error)
            raise
        finally:
            for _, future in wanted:
                future.cancel()  # nothing, unless this call was given up
