"""Dynamic batching: images wait a few milliseconds for company, up to a budget of patches, and are encoded in order.

An image larger than the budget goes alone, one such image after the other, beside the batches of the others: these
have their turns while it is encoded (`encode_thread`), so that nobody waits for a large image to end, and none
starves. Knows nothing of decoding, stores or gRPC.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import structlog
import torch

from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.tasks import end_tasks, keep_running
from lookonce.models.family import Patches
from lookonce.models.omp_thread import Pause
from vision_service import metrics
from vision_service.encode_thread import EncodeThread, Stopped

Encode = Callable[[Sequence[Patches], Pause], list[torch.Tensor]]
log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Encoded:
    """Rows of one image, and how long it waited and its batch took (milliseconds)."""

    rows: torch.Tensor  # as of `VisionEncoder.encode`: CPU, compute dtype
    queue_ms: float
    encode_ms: float


@dataclass(eq=False)
class _Item:
    patches: Patches
    begun: Callable[[], None]
    future: asyncio.Future[Encoded]
    since: float = field(default_factory=time.perf_counter)


@dataclass(eq=False)
class _Line:
    """Images that wait, oldest first."""

    items: deque[_Item] = field(default_factory=deque)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, item: _Item) -> None:
        self.items.append(item)
        self.arrived.set()

    @property
    def patches(self) -> int:
        return sum(item.patches.count for item in self.items)

    def take(self, budget: int) -> list[_Item]:
        """The oldest image and those behind it that still fit."""
        batch: list[_Item] = []
        left: deque[_Item] = deque()
        for item in self.items:
            if not batch or item.patches.count <= budget:
                batch.append(item)
                budget -= item.patches.count
            else:
                left.append(item)
        self.items = left
        if not left:
            self.arrived.clear()
        return batch


class Batcher:
    """Runs on one event loop between `start` and `close`.

    `expected` tells how many more images are being prepared: with none there is nobody to wait for.
    """

    def __init__(
        self, encode: Encode, *, max_patches: int, wait: float, queue_patches: int, expected: Callable[[], int]
    ) -> None:
        self._encode = encode
        self._max_patches = max_patches
        self._wait = wait  # seconds
        self._queue_patches = queue_patches
        self._expected = expected
        self._small, self._large = _Line(), _Line()
        self._room = asyncio.Event()
        self._room.set()
        self._thread: EncodeThread[list[torch.Tensor | None]] = EncodeThread()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to encode."""
        self._tasks = [keep_running(partial(self._run, line)) for line in (self._small, self._large)]

    async def close(self) -> None:
        """Stop: images under way and those still waiting fail with UNAVAILABLE."""
        await end_tasks(*self._tasks)
        await self._thread.close()

    async def room(self) -> None:
        """Return once the queue is short enough that another image is worth preparing."""
        await self._room.wait()

    async def encode(self, patches: Patches, *, begun: Callable[[], None] = lambda: None) -> Encoded:
        """Wait for a batch, then for its rows; `begun` is called in between. Cancelling takes an image that still
        waits out of the queue. Raises UNAVAILABLE when nothing is encoded any more."""
        if any(task.done() for task in self._tasks):
            raise _stopping()
        item = _Item(patches, begun, asyncio.get_running_loop().create_future())
        line = self._large if patches.count > self._max_patches else self._small
        line.add(item)
        self._count()
        try:
            return await item.future
        except asyncio.CancelledError:
            if item in line.items:
                line.items.remove(item)
                self._count()
            raise

    async def _run(self, line: _Line) -> None:
        try:
            while True:
                await line.arrived.wait()
                await self._linger(line)
                batch = line.take(self._max_patches)
                self._count()
                if batch:
                    await self._encode_batch(batch)
        finally:
            _fail(line.items, _stopping())
            line.items.clear()
            self._count()

    async def _linger(self, line: _Line) -> None:
        """Wait for company until the oldest image has waited long enough or the budget is reached."""
        while line.items and line.patches < self._max_patches and self._expected() > 0:
            left = line.items[0].since + self._wait - time.perf_counter()
            if left <= 0:
                return
            line.arrived.clear()
            try:
                async with asyncio.timeout(left):
                    await line.arrived.wait()
            except TimeoutError:
                return

    def _count(self) -> None:
        waiting = self._small.patches + self._large.patches
        metrics.WAITING_PATCHES.set(waiting)
        if waiting < self._queue_patches:
            self._room.set()
        else:
            self._room.clear()

    async def _encode_batch(self, batch: list[_Item]) -> None:
        """Encode; when a batch fails, each of its images is tried alone, so one can't take others down."""
        started = time.perf_counter()
        for item in batch:
            item.begun()
        try:
            parts = await self._thread.run(lambda pause: self._forward([item.patches for item in batch], pause))
        except Stopped:
            _fail(batch, _stopping())
            return
        except Exception:  # whatever it is, those who wait for it are told
            log.exception("forward failed", images=len(batch), patches=sum(item.patches.count for item in batch))
            if len(batch) == 1:
                _fail(batch, LookonceError(ErrorKind.INTERNAL, "the encoder failed on this image"))
                return
            for item in batch:
                await self._encode_batch([item])
            return
        except BaseException:  # cancelled; nobody may wait for ever
            _fail(batch, _stopping())
            raise
        took = time.perf_counter() - started
        metrics.BATCH_PATCHES.observe(sum(item.patches.count for item in batch))
        metrics.ENCODE_SECONDS.observe(took)
        for item, rows in zip(batch, parts, strict=True):
            if rows is None:
                _fail([item], LookonceError(ErrorKind.INTERNAL, "the encoder made values that are not finite"))
            elif not item.future.done():
                item.future.set_result(Encoded(rows, 1000 * (started - item.since), 1000 * took))

    def _forward(self, batch: list[Patches], pause: Pause) -> list[torch.Tensor | None]:
        """In the encode thread. None for an image whose rows are not finite."""
        return [rows if bool(rows.isfinite().all()) else None for rows in self._encode(batch, pause)]


def _stopping() -> LookonceError:
    return LookonceError(ErrorKind.UNAVAILABLE, "the vision service is stopping", retry_after=1.0)


def _fail(items: Iterable[_Item], error: LookonceError) -> None:
    for item in items:
        if not item.future.done():
            item.future.set_exception(error)
