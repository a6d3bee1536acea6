"""Tiers: near ones are filled by reads, all are reached by writes and deletes."""

from __future__ import annotations

import asyncio

from lookonce.core.stores.memory import MemoryStore
from lookonce.core.stores.tiered import TieredStore


class Slow(MemoryStore):
    """A tier of which one operation waits until `gate` opens: the answer of "get", the work of "put" or "delete"."""

    def __init__(self, operation="get") -> None:
        super().__init__(1 << 20)
        self.operation = operation
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked = asyncio.Event()

    async def _wait(self, operation):
        if operation == self.operation:
            self.asked.set()
            await self.gate.wait()

    async def get(self, key):
        value = await super().get(key)
        await self._wait("get")
        return value

    async def put(self, key, value, *, ttl=None):
        await self._wait("put")
        return await super().put(key, value, ttl=ttl)

    async def delete(self, key):
        await self._wait("delete")
        return await super().delete(key)


async def test_a_read_fills_the_near_tier():
    near, far = MemoryStore(1 << 20), MemoryStore(1 << 20)
    store = TieredStore([near, far])
    await far.put(b"key", b"value")
    assert await store.get(b"key") == b"value"
    assert await near.contains(b"key")
    await store.get(b"key")
    assert far.stats()[0].hits == 1
    assert [stats.hits for stats in store.stats()] == [1, 1]


async def test_writes_and_deletes_reach_all():
    tiers = [MemoryStore(1 << 20), MemoryStore(1 << 20), MemoryStore(1 << 20)]
    store = TieredStore(tiers)
    assert await store.put(b"key", b"value")
    assert [await tier.contains(b"key") for tier in tiers] == [True] * 3
    assert await store.delete(b"key")
    assert [await tier.contains(b"key") for tier in tiers] == [False] * 3


async def test_leases_live_in_the_shared_tier():
    far = MemoryStore(1 << 20)
    one, other = TieredStore([MemoryStore(1 << 20), far]), TieredStore([MemoryStore(1 << 20), far])
    assert await one.acquire(b"lease", b"a", 5)
    assert not await other.acquire(b"lease", b"b", 5)
    await one.release(b"lease", b"a")
    assert await other.acquire(b"lease", b"b", 5)


async def test_a_read_under_way_does_not_bring_back_what_is_deleted():
    near, far = MemoryStore(1 << 20), Slow()
    store = TieredStore([near, far])
    await far.put(b"key", b"value")
    far.gate.clear()
    read = asyncio.ensure_future(store.get(b"key"))
    await far.asked.wait()
    assert await store.delete(b"key")
    far.gate.set()
    await read
    assert not await near.contains(b"key")
    assert await store.get(b"key") is None


async def test_a_read_under_way_does_not_bring_back_what_was_found_to_be_damaged():
    near, far = MemoryStore(1 << 20), Slow()
    store = TieredStore([near, far])
    await far.put(b"key", b"damaged")
    far.gate.clear()
    read = asyncio.ensure_future(store.get(b"key"))
    await far.asked.wait()
    await store.discard(b"key", b"damaged")
    far.gate.set()
    await read
    assert not await near.contains(b"key")


async def test_a_near_tier_that_is_being_filled_does_not_keep_what_is_deleted():
    near, far = Slow("put"), MemoryStore(1 << 20)
    store = TieredStore([near, far])
    await far.put(b"key", b"value")
    near.gate.clear()
    read = asyncio.ensure_future(store.get(b"key"))
    await asyncio.wait_for(near.asked.wait(), 10)
    assert await store.delete(b"key")
    near.gate.set()
    await read
    assert not await near.contains(b"key")


async def test_a_read_during_a_deletion_does_not_bring_it_back():
    near, far = MemoryStore(1 << 20), Slow("delete")
    store = TieredStore([near, far])
    await store.put(b"key", b"value")
    far.gate.clear()
    deletion = asyncio.ensure_future(store.delete(b"key"))
    await asyncio.wait_for(far.asked.wait(), 10)
    await store.get(b"key")
    far.gate.set()
    assert await deletion
    assert await store.get(b"key") is None


async def test_a_read_under_way_does_not_hide_what_was_written_since():
    near, far = MemoryStore(1 << 20), Slow()
    store = TieredStore([near, far])
    await far.put(b"key", b"old")
    far.gate.clear()
    read = asyncio.ensure_future(store.get(b"key"))
    await far.asked.wait()
    await store.put(b"key", b"new")
    far.gate.set()
    await read
    assert await store.get(b"key") == b"new"


async def test_the_near_tier_serves_while_the_far_one_refuses():
    store = TieredStore([MemoryStore(1 << 20), MemoryStore(100)])
    assert not await store.put(b"key", bytes(5000)), "others cannot see it"
    assert await store.get(b"key") == bytes(5000)
