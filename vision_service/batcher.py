"""Dynamic batching: pictures wait a few milliseconds for company, up to a budget of patches, and are encoded in order.

One thread encodes. A picture larger than the budget goes alone, and the oldest always goes first, so none starves.
Knows nothing of decoding, stores or gRPC.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import structlog
import torch

from lookonce.errors import ErrorKind, LookonceError
from lookonce.tasks import end_tasks, keep_running
from vision_service import metrics
from vision_service.preprocess import Patches

Encode = Callable[[Sequence[Patches]], list[torch.Tensor]]
log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Encoded:
    """Rows of one picture, and how long it waited and its batch took (milliseconds)."""

    rows: torch.Tensor  # [tokens, hidden], CPU, compute dtype
    queue_ms: float
    encode_ms: float


@dataclass(eq=False)
class _Item:
    patches: Patches
    future: asyncio.Future[Encoded]
    since: float = field(default_factory=time.perf_counter)


class Batcher:
    """Runs on one event loop between `start` and `close`.

    `expected` tells how many more pictures are being prepared: with none there is nobody to wait for.
    """

    def __init__(
        self, encode: Encode, *, max_patches: int, wait: float, queue_patches: int, expected: Callable[[], int]
    ) -> None:
        self._encode = encode
        self._max_patches = max_patches
        self._wait = wait  # seconds
        self._queue_patches = queue_patches
        self._expected = expected
        self._queue: deque[_Item] = deque()
        self._waiting = 0  # patches in the queue
        self._arrived = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to encode."""
        self._task = keep_running(self._run)

    async def close(self) -> None:
        """Stop after the batch under way; pictures still waiting fail with UNAVAILABLE."""
        if self._task is not None:
            await end_tasks(self._task)
        await asyncio.to_thread(self._thread.shutdown)

    async def room(self) -> None:
        """Return once the queue is short enough that another picture is worth preparing."""
        await self._room.wait()

    async def encode(self, patches: Patches) -> Encoded:
        """Wait for a batch, then for its rows. Cancelling takes the picture out of the queue. Raises UNAVAILABLE when
        nothing is encoded any more."""
        if self._task is not None and self._task.done():
            raise _stopping()
        item = _Item(patches, asyncio.get_running_loop().create_future())
        self._queue.append(item)
        self._count(patches.count)
        self._arrived.set()
        try:
            return await item.future
        except asyncio.CancelledError:
            if item in self._queue:
                self._queue.remove(item)
                self._count(-patches.count)
            raise

    async def _run(self) -> None:
        try:
            while True:
                await self._arrived.wait()
                await self._linger()
                batch = self._take()
                if batch:
                    await self._encode_batch(batch)
        finally:
            for item in self._queue:
                _fail(item, _stopping())
            self._queue.clear()

    async def _linger(self) -> None:
        """Wait for company until the oldest picture has waited long enough or the budget is reached."""
        while self._queue and self._waiting < self._max_patches and self._expected() > 0:
            left = self._queue[0].since + self._wait - time.perf_counter()
            if left <= 0:
                return
            self._arrived.clear()
            try:
                async with asyncio.timeout(left):
                    await self._arrived.wait()
            except TimeoutError:
                return

    def _take(self) -> list[_Item]:
        """The oldest picture and those behind it that still fit the budget."""
        batch: list[_Item] = []
        left: deque[_Item] = deque()
        budget = self._max_patches
        for item in self._queue:
            if not batch or item.patches.count <= budget:
                batch.append(item)
                budget -= item.patches.count
            else:
                left.append(item)
        self._queue = left
        self._count(-sum(item.patches.count for item in batch))
        if not left:
            self._arrived.clear()
        else:
            self._arrived.set()
        return batch

    def _count(self, patches: int) -> None:
        self._waiting += patches
        metrics.WAITING_PATCHES.set(self._waiting)
        if self._waiting < self._queue_patches:
            self._room.set()
        else:
            self._room.clear()

    async def _encode_batch(self, batch: list[_Item]) -> None:
        """Encode; when a batch fails, each of its pictures is tried alone, so one can't take others down."""
        started = time.perf_counter()
        work = asyncio.get_running_loop().run_in_executor(self._thread, self._forward, [item.patches for item in batch])
        try:
            parts = await work
        except Exception:  # whatever it is, those who wait for it are told
            log.exception("forward failed", pictures=len(batch), patches=sum(item.patches.count for item in batch))
            if len(batch) == 1:
                _fail(batch[0], LookonceError(ErrorKind.INTERNAL, "the encoder failed on this image"))
                return
            for item in batch:
                await self._encode_batch([item])
            return
        except asyncio.CancelledError:
            for item in batch:
                _fail(item, _stopping())
            raise
        took = time.perf_counter() - started
        metrics.BATCH_PATCHES.observe(sum(item.patches.count for item in batch))
        metrics.ENCODE_SECONDS.observe(took)
        for item, rows in zip(batch, parts, strict=True):
            if rows is None:
                _fail(item, LookonceError(ErrorKind.INTERNAL, "the encoder made values that are not finite"))
            elif not item.future.done():
                item.future.set_result(Encoded(rows, 1000 * (started - item.since), 1000 * took))

    def _forward(self, batch: list[Patches]) -> list[torch.Tensor | None]:
        """In the encode thread. None for a picture whose rows are not finite."""
        return [rows if bool(rows.isfinite().all()) else None for rows in self._encode(batch)]


def _stopping() -> LookonceError:
    return LookonceError(ErrorKind.UNAVAILABLE, "the vision service is stopping", retry_after=1.0)


def _fail(item: _Item, error: LookonceError) -> None:
    if not item.future.done():
        item.future.set_exception(error)
