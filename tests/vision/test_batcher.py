"""Batches: which images share one, how long they wait for it; and who waits gets rows or an error, never nothing."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import numpy as np
import pytest
import torch

from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.models.family import Patches
from vision_service import metrics
from vision_service.batcher import Batcher

IMAGE = Patches(np.zeros((4, 3, 4), dtype=np.uint8), (1, 2, 2), 4, 4)


def batcher(expected=lambda: 0):
    def encode(batch, pause):
        return [torch.zeros(1, 8) for _ in batch]

    return Batcher(encode, max_patches=8, wait=0.001, queue_patches=64, expected=expected)


async def test_after_the_end_nobody_waits():
    one = batcher()
    one.start()
    assert (await one.encode(IMAGE)).rows.shape == (1, 8)
    await one.close()
    with pytest.raises(LookonceError) as refused:
        await asyncio.wait_for(one.encode(IMAGE), 10)
    assert refused.value.kind is ErrorKind.UNAVAILABLE


async def test_small_images_have_their_turns_in_the_pauses_of_a_large_one():
    ended = []

    def encode(batch, pause):
        while batch[0] is large and len(ended) < 3:
            pause()
        ended.append(batch[0].count)
        return [torch.zeros(1, 8) for _ in batch]

    large = Patches(np.zeros((12, 3, 4), dtype=np.uint8), (1, 2, 6), 12, 4)
    one = Batcher(encode, max_patches=8, wait=0.001, queue_patches=64, expected=lambda: 0)
    one.start()
    work = asyncio.create_task(one.encode(large))
    for _ in range(3):
        await asyncio.wait_for(one.encode(IMAGE), 10)
    await asyncio.wait_for(work, 10)
    assert ended == [4, 4, 4, 12]
    await one.close()


async def test_a_long_forward_is_given_up_when_the_service_ends():
    def encode(batch, pause):
        begun.set()
        while True:
            pause()

    begun = threading.Event()
    one = Batcher(encode, max_patches=8, wait=0.001, queue_patches=64, expected=lambda: 0)
    one.start()
    work = asyncio.create_task(one.encode(IMAGE))
    await asyncio.to_thread(begun.wait, 10)
    await asyncio.wait_for(one.close(), 10)
    with pytest.raises(LookonceError) as refused:
        await work
    assert refused.value.kind is ErrorKind.UNAVAILABLE


async def test_a_fault_in_the_batching_itself_reaches_all_who_wait_and_those_who_come_later():
    one = batcher(lambda: 1 // 0)
    one.start()
    for _ in range(2):
        with pytest.raises(LookonceError) as refused:
            await asyncio.wait_for(one.encode(IMAGE), 10)
        assert refused.value.kind is ErrorKind.UNAVAILABLE
    await one.close()


def image(count):
    """`count` patches, by which it is known here."""
    return Patches(np.zeros((count, 3, 4), dtype=np.uint8), (1, 2, count // 2), count, 4)


class Forward:
    """Notes the patches of each batch; rows are an image's count. Calls last until `go`; batches with `bad` fail."""

    def __init__(self, bad=(), rows=float):
        self.batches, self.bad, self.rows = [], bad, rows
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, batch, pause):
        self.batches.append([one.count for one in batch])
        self.begun.set()
        while not self.go.wait(0.001):
            pause()
        if any(one.count in self.bad for one in batch):
            raise RuntimeError("no forward")
        return [torch.full((1, 8), self.rows(one.count)) for one in batch]


@contextlib.asynccontextmanager
async def batching(forward, *, max_patches=8, wait=0.0, queue_patches=64, expected=lambda: 0):
    """A batcher whose thread is busy with an image of one patch until `forward.go`."""
    one = Batcher(forward, max_patches=max_patches, wait=wait, queue_patches=queue_patches, expected=expected)
    one.start()
    first = asyncio.create_task(one.encode(image(1)))
    await asyncio.to_thread(forward.begun.wait, 10)
    try:
        yield one
        forward.go.set()
        await asyncio.wait_for(first, 10)
    finally:
        forward.go.set()
        await one.close()


async def waiting(one, counts):
    """A task for each count; returns once all of them wait."""
    tasks = []
    for count in counts:
        tasks.append(asyncio.create_task(one.encode(image(count))))
        await asyncio.sleep(0)
    return tasks


async def test_the_oldest_goes_first_with_those_behind_it_that_fit():
    forward = Forward()
    async with batching(forward) as one:
        tasks = await waiting(one, [5, 6, 3, 2, 7])
        assert metrics.WAITING_PATCHES._value.get() == 23
        forward.go.set()
        encoded = await asyncio.wait_for(asyncio.gather(*tasks), 10)
    assert forward.batches == [[1], [5, 3], [6, 2], [7]]
    assert [int(each.rows[0, 0]) for each in encoded] == [5, 6, 3, 2, 7]
    assert metrics.WAITING_PATCHES._value.get() == 0


async def test_large_images_go_alone_and_one_after_the_other():
    forward = Forward()
    async with batching(forward) as one:
        tasks = await waiting(one, [12, 16, 2, 9, 4])
        forward.go.set()
        await asyncio.wait_for(asyncio.gather(*tasks), 10)
    assert [batch for batch in forward.batches if max(batch) > 8] == [[12], [16], [9]]
    assert [batch for batch in forward.batches if max(batch) <= 8] == [[1], [2, 4]]


@pytest.mark.parametrize(
    ("counts", "expected", "wait", "batches"),
    [
        pytest.param([2, 3], 1, 0.3, [[2, 3]], id="waits for the expected"),
        pytest.param([2, 3], 0, 60.0, [[2], [3]], id="nobody is expected"),
        pytest.param([2, 6, 3], 1, 60.0, [[2, 6]], id="the budget is reached"),
    ],
)
async def test_how_long_an_image_waits_for_company(counts, expected, wait, batches):
    forward = Forward()
    forward.go.set()
    one = Batcher(forward, max_patches=8, wait=wait, queue_patches=64, expected=lambda: expected)
    one.start()
    tasks = []
    for count in counts:
        tasks.append(asyncio.create_task(one.encode(image(count))))
        await asyncio.sleep(0.05)
    async with asyncio.timeout(10):
        await asyncio.gather(*tasks[: sum(len(batch) for batch in batches)])
    assert forward.batches == batches
    await one.close()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_cancelled_image_leaves_the_queue():
    forward = Forward()
    async with batching(forward, queue_patches=6) as one:
        tasks = await waiting(one, [4, 6])
        blocked = asyncio.create_task(one.room())
        await asyncio.sleep(0.01)
        assert not blocked.done()
        tasks[1].cancel()
        await asyncio.wait_for(blocked, 10)
        forward.go.set()
        assert int((await asyncio.wait_for(tasks[0], 10)).rows[0, 0]) == 4
    assert tasks[1].cancelled() and forward.batches == [[1], [4]]


async def test_there_is_room_again_once_a_batch_is_taken():
    forward = Forward()
    async with batching(forward, queue_patches=8) as one:
        await asyncio.wait_for(one.room(), 10)
        tasks = await waiting(one, [3, 5])
        blocked = asyncio.create_task(one.room())
        await asyncio.sleep(0.01)
        assert not blocked.done()
        forward.go.set()
        await asyncio.wait_for(asyncio.gather(blocked, *tasks), 10)


async def test_the_end_fails_those_who_wait_and_encodes_none_of_them():
    forward = Forward()
    one = Batcher(forward, max_patches=8, wait=0.0, queue_patches=64, expected=lambda: 0)
    one.start()
    first = asyncio.create_task(one.encode(image(1)))
    await asyncio.to_thread(forward.begun.wait, 10)
    tasks = await waiting(one, [2, 12])
    await asyncio.wait_for(one.close(), 10)
    for task in (first, *tasks):
        with pytest.raises(LookonceError) as refused:
            await asyncio.wait_for(task, 10)
        assert refused.value.kind is ErrorKind.UNAVAILABLE
    assert forward.batches == [[1]]


async def test_one_image_that_fails_takes_no_other_down():
    forward, begun = Forward(bad=(3,)), []
    async with batching(forward) as one:
        tasks = [
            asyncio.create_task(one.encode(image(count), begun=lambda count=count: begun.append(count)))
            for count in (2, 3)
        ]
        await asyncio.sleep(0.01)
        assert begun == []
        forward.go.set()
        assert int((await asyncio.wait_for(tasks[0], 10)).rows[0, 0]) == 2
        with pytest.raises(LookonceError) as failed:
            await asyncio.wait_for(tasks[1], 10)
        assert failed.value.kind is ErrorKind.INTERNAL and begun[:2] == [2, 3]
    assert forward.batches == [[1], [2, 3], [2], [3]]


async def test_values_that_are_not_finite_fail_their_own_image_only():
    forward = Forward(rows=lambda count: float("nan") if count == 3 else count)
    async with batching(forward) as one:
        tasks = await waiting(one, [2, 3, 1])
        forward.go.set()
        two, three, last = await asyncio.gather(*tasks, return_exceptions=True)
    assert int(two.rows[0, 0]) == 2 and int(last.rows[0, 0]) == 1
    assert isinstance(three, LookonceError) and three.kind is ErrorKind.INTERNAL and "not finite" in three.message
