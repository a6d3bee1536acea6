"""Who waits for a batch gets rows or an error, never nothing."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest
import torch

from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.models.family import Patches
from vision_service.batcher import Batcher

PICTURE = Patches(np.zeros((4, 3, 4), dtype=np.uint8), (1, 2, 2), 4, 4)


def batcher(expected=lambda: 0):
    def encode(batch, pause):
        return [torch.zeros(1, 8) for _ in batch]

    return Batcher(encode, max_patches=8, wait=0.001, queue_patches=64, expected=expected)


async def test_after_the_end_nobody_waits():
    one = batcher()
    one.start()
    assert (await one.encode(PICTURE)).rows.shape == (1, 8)
    await one.close()
    with pytest.raises(LookonceError) as refused:
        await asyncio.wait_for(one.encode(PICTURE), 10)
    assert refused.value.kind is ErrorKind.UNAVAILABLE


async def test_small_pictures_have_their_turns_in_the_pauses_of_a_large_one():
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
        await asyncio.wait_for(one.encode(PICTURE), 10)
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
    work = asyncio.create_task(one.encode(PICTURE))
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
            await asyncio.wait_for(one.encode(PICTURE), 10)
        assert refused.value.kind is ErrorKind.UNAVAILABLE
    await one.close()
