"""Writes to the embedded store that wait at the same time: one transaction for many, an outcome for each."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb
import pytest
from lmdb.verify import verify

from lookonce.core.stores import StoreFailure
from lookonce.core.stores.embedded import MAX_WAITING_WRITES, EmbeddedStore
from lookonce.core.stores.group_commit import MAX_TOGETHER
from lookonce.core.stores.lmdb_file import close_lmdb, open_lmdb

MIB = 1024**2
COST = 25 * 4096 + 512
"""What a value of 100 kB takes of the budget."""


@contextmanager
def environment(path: Path) -> Iterator[lmdb.Environment]:
    file = open_lmdb(path, 0)
    try:
        yield file.env
    finally:
        close_lmdb(file)


@contextmanager
def writers_wait(path: Path) -> Iterator[None]:
    """Holds LMDB's write lock, as another process might. Changes nothing."""
    with environment(path) as env, env.begin(write=True):
        yield


def transactions(path: Path) -> int:
    """Write transactions so far that changed anything."""
    with environment(path) as env:
        return int(env.info()["last_txnid"])


def key_of(number: int) -> bytes:
    return number.to_bytes(32, "big")


async def queued(*operations: Coroutine) -> list[asyncio.Task]:
    """All of them under way, in this order."""
    tasks = [asyncio.create_task(operation) for operation in operations]
    await asyncio.sleep(0)
    return tasks


async def test_writes_that_wait_share_transactions_and_are_answered_once_visible(tmp_path):
    store, other = EmbeddedStore(tmp_path, 64 * MIB), EmbeddedStore(tmp_path, 64 * MIB)
    await store.put(key_of(200), b"old")

    async def put(number: int) -> bytes:
        assert await store.put(key_of(number), b"%d" % number)
        return bytes(await other.get(key_of(number)) or b"")

    before = transactions(tmp_path)
    with writers_wait(tmp_path):
        tasks = await queued(
            *(put(number) for number in range(100)),
            store.acquire(b"lease", b"me", 60),
            store.acquire(b"lease", b"you", 60),
            store.delete(key_of(200)),
            store.put(key_of(3), b"3"),
        )
        assert await other.get(key_of(200)) == b"old", "reads go on"
        assert not any(task.done() for task in tasks)
    results = await asyncio.gather(*tasks)
    assert results == [b"%d" % number for number in range(100)] + [True, False, True, True]
    assert 1 <= transactions(tmp_path) - before <= 3, "one that was under way, and 64 writes in each of the others"
    assert MAX_TOGETHER == 64
    assert not await other.contains(key_of(200))
    stats = store.stats()[0]
    assert (stats.puts, stats.entries, stats.bytes) == (102, 100, 100 * (4096 + 512))
    await store.close()
    await other.close()


async def test_large_values_do_not_make_a_long_transaction(tmp_path):
    store = EmbeddedStore(tmp_path, 64 * MIB)
    before = transactions(tmp_path)
    assert all(await asyncio.gather(*(store.put(key_of(number), bytes(3 * MIB)) for number in range(6))))
    assert transactions(tmp_path) - before >= 3
    await store.close()


async def test_refusals_among_many_where_nothing_is_evicted(tmp_path):
    store = EmbeddedStore(tmp_path, 10 * COST, evicts=False)
    for number in range(8):
        assert await store.put(key_of(number), bytes(100_000))
    before = transactions(tmp_path)
    with writers_wait(tmp_path):
        tasks = await queued(
            store.put(key_of(8), bytes(100_000)),
            store.put(key_of(99), bytes(2_000_000)),  # over the budget
            store.put(b"", b"no key"),
            store.put(key_of(9), bytes(100_000)),
            store.put(key_of(10), bytes(100_000)),  # no room
            store.put(key_of(0), bytes(200_000)),  # no room for the larger one: the old one stays
            store.put(key_of(1), bytes([1]) * 100_000),  # replaces
            store.delete(key_of(2)),
            store.put(key_of(11), bytes(100_000)),  # into the room of the deleted one
            store.put(key_of(12), bytes(100_000)),  # no room
        )
    assert await asyncio.gather(*tasks) == [True, False, False, True, False, False, True, True, True, False]
    assert transactions(tmp_path) - before <= 2
    assert [n for n in range(13) if await store.contains(key_of(n))] == [0, 1, 3, 4, 5, 6, 7, 8, 9, 11]
    assert len(await store.get(key_of(0))) == 100_000
    assert (await store.get(key_of(1)))[0] == 1
    stats = store.stats()[0]
    assert (stats.entries, stats.bytes, stats.puts, stats.refused, stats.evictions) == (10, 10 * COST, 12, 5, 0)
    await store.close()


async def test_evictions_among_many(tmp_path):
    store = EmbeddedStore(tmp_path, 10 * COST)
    for number in range(10):
        assert await store.put(key_of(number), bytes(100_000))
    await store.get(key_of(0))  # a use
    with writers_wait(tmp_path):
        tasks = await queued(
            *(store.put(key_of(number), bytes(100_000)) for number in range(10, 15)),
            store.put(key_of(99), bytes(2_000_000)),  # over the budget
            *(store.put(key_of(number), bytes(100_000)) for number in range(15, 18)),
        )
    assert await asyncio.gather(*tasks) == [True] * 5 + [False] + [True] * 3
    assert [n for n in range(18) if await store.contains(key_of(n))] == [0, 9, *range(10, 18)]
    stats = store.stats()[0]
    assert (stats.entries, stats.bytes, stats.puts, stats.refused, stats.evictions) == (10, 10 * COST, 18, 1, 8)
    await store.close()


async def test_a_write_that_fails_harms_no_other(tmp_path):
    store = EmbeddedStore(tmp_path, 64 * MIB)
    with environment(tmp_path) as env, env.begin(write=True, db=env.open_db(b"leases")) as transaction:
        transaction.put(b"damaged", b"x")
    with writers_wait(tmp_path):
        tasks = await queued(
            store.put(b"before", b"1"),
            store.acquire(b"sound", b"me", 60),
            store.acquire(b"damaged", b"me", 60),
            store.put(b"endless", b"2", ttl=1e12),  # no such time fits
            store.put(b"after", b"3"),
            store.acquire(b"sound", b"you", 60),
        )
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [outcomes[n] for n in (0, 1, 2, 4, 5)] == [True, True, True, True, False]  # a damaged lease is nobody's
    assert isinstance(outcomes[3], StoreFailure)
    assert await store.get(b"before") == b"1"
    assert await store.get(b"after") == b"3"
    assert not await store.contains(b"endless")
    assert (store.stats()[0].entries, store.stats()[0].puts) == (2, 2)
    await store.close()


@pytest.mark.parametrize("evicts", [True, False])
async def test_a_full_file_refuses_only_what_has_no_room_in_it(tmp_path, evicts):
    store = EmbeddedStore(tmp_path, 8 * MIB, evicts=evicts)
    pinned = []
    for number in range(100):  # replaced again and again while every version is pinned: the map has an end
        if not await store.put(b"same", bytes([number]) * (4 * MIB)):
            break
        pinned.append(await store.get(b"same"))
    assert 2 <= len(pinned) < 100
    del pinned[:2]  # the pages of the first can be used again
    with writers_wait(tmp_path):
        tasks = await queued(
            store.acquire(b"lease", b"me", 60),
            *(store.put(key_of(number), bytes(10_000)) for number in range(10)),
            store.delete(b"same"),
            store.put(b"large", bytes(7 * MIB)),  # within the budget
            *(store.put(key_of(number), bytes(10_000)) for number in range(10, 20)),
        )
    assert await asyncio.gather(*tasks) == [True] * 12 + [False] + [True] * 10
    assert all([await store.contains(key_of(number)) for number in range(20)])
    assert all(view[0] == view[-1] == number for number, view in enumerate(pinned, 2))
    pinned.clear()
    assert await store.put(b"large", bytes(7 * MIB)), "room comes back with the views"
    await store.close()
    assert verify(str(tmp_path / "data.mdb"), subdir=False) == []


async def test_a_caller_that_goes_away_takes_no_write_with_it(tmp_path):
    store = EmbeddedStore(tmp_path, 64 * MIB)
    with writers_wait(tmp_path):
        tasks = await queued(*(store.put(key_of(number), b"value") for number in range(20)))
        tasks[0].cancel()
        tasks[7].cancel()
        await asyncio.wait([tasks[0], tasks[7]])
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [n for n, outcome in enumerate(outcomes) if outcome is not True] == [0, 7]
    assert all([await store.contains(key_of(number)) for number in range(20)])
    await store.close()


async def test_closing_writes_what_is_queued(tmp_path):
    store = EmbeddedStore(tmp_path, 64 * MIB)
    with writers_wait(tmp_path):
        tasks = await queued(*(store.put(key_of(number), b"value") for number in range(100)))
        (closing,) = await queued(store.close())
        with pytest.raises(StoreFailure):
            await store.put(b"late", b"value")
    assert await asyncio.gather(*tasks) == [True] * 100
    await closing
    store = EmbeddedStore(tmp_path, 64 * MIB)
    assert store.stats()[0].entries == 100
    await store.close()


async def test_as_many_wait_as_may_and_no_more(tmp_path):
    store = EmbeddedStore(tmp_path, 64 * MIB)
    with writers_wait(tmp_path):
        tasks = await queued(*(store.put(key_of(number), b"value") for number in range(MAX_WAITING_WRITES)))
        with pytest.raises(StoreFailure):
            await store.put(b"late", b"value")
    assert all(await asyncio.gather(*tasks))

    async def caller(number: int) -> None:
        for _ in range(5):  # their places are free again by the time they are answered
            assert await store.put(key_of(number), b"again")

    await asyncio.gather(*(caller(number) for number in range(MAX_WAITING_WRITES)))
    await store.close()


async def test_who_polls_for_a_lease_waits_for_no_write(tmp_path):
    first, second = EmbeddedStore(tmp_path, MIB), EmbeddedStore(tmp_path, MIB)
    assert await first.acquire(b"lease", b"me", 60)
    assert not await second.acquire(b"lease", b"you", 60)
    before = transactions(tmp_path)
    assert not await second.acquire(b"lease", b"you", 60)
    assert transactions(tmp_path) == before
    with writers_wait(tmp_path):
        assert not await second.acquire(b"lease", b"you", 60)
    await first.release(b"lease", b"me")
    assert await second.acquire(b"lease", b"you", 60)
    await first.close()
    await second.close()


LOAD = """
import asyncio, os, sys
from pathlib import Path
from lookonce.core.stores.embedded import EmbeddedStore

async def caller(store):
    while True:
        key = os.urandom(32)
        assert await store.acquire(key, b"owner", 60)
        assert await store.put(key, key * 200)
        print(key.hex(), flush=True)
        await store.release(key, b"owner")

async def main():
    store = EmbeddedStore(Path(sys.argv[1]), 512 * 1024**2)
    await asyncio.gather(*(caller(store) for _ in range(64)))

asyncio.run(main())
"""


def answered_until_killed(path: Path) -> list[bytes]:
    """Keys of a process whose writes were answered before it was killed."""
    with subprocess.Popen([sys.executable, "-c", LOAD, path], stdout=subprocess.PIPE) as process:
        lines = [process.stdout.readline() for _ in range(500)]
        process.kill()
        lines += process.stdout.readlines()
    return [bytes.fromhex(line.decode()) for line in lines if line.endswith(b"\n")]


async def test_killed_under_load_nothing_that_was_answered_is_lost(tmp_path):
    answered = answered_until_killed(tmp_path)
    assert len(answered) >= 500
    assert verify(str(tmp_path / "data.mdb"), subdir=False) == []
    store = EmbeddedStore(tmp_path, 512 * MIB)
    for key in answered:
        assert await store.get(key) == key * 200
    stats = store.stats()[0]
    with environment(tmp_path) as env, env.begin() as transaction:
        entries = transaction.stat(env.open_db(b"entries", transaction))["entries"]
        values = transaction.stat(env.open_db(b"values", transaction))["entries"]
    assert entries == values == stats.entries >= len(answered)
    assert stats.bytes == entries * (2 * 4096 + 512)
    await store.close()
    assert not (tmp_path / "damaged").exists()
