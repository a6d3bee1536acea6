"""Who waits for a batch gets rows or an error, never nothing."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch

from lookonce.errors import ErrorKind, LookonceError
from vision_service.batcher import Batcher
from vision_service.preprocess import Patches

PICTURE = Patches(np.zeros((4, 3, 4), dtype=np.uint8), (1, 2, 2), 4, 4)


def batcher(expected=lambda: 0):
    def encode(batch):
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


async def test_a_fault_in_the_batching_itself_reaches_all_who_wait_and_those_who_come_later():
    one = batcher(lambda: 1 // 0)
    one.start()
    for _ in range(2):
        with pytest.raises(LookonceError) as refused:
            await asyncio.wait_for(one.encode(PICTURE), 10)
        assert refused.value.kind is ErrorKind.UNAVAILABLE
    await one.close()
