"""The embedded store: budget, eviction, recovery from damage, and processes killed at any instant."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import stat
import subprocess
import sys
import time

import pytest
from lmdb.verify import verify

from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.record import parse_record
from lookonce.core.stores import StoreFailure, open_store
from lookonce.core.stores.embedded import EmbeddedStore
from lookonce.core.stores.memory import ENTRY_OVERHEAD, MemoryStore

MIB = 1024**2


class Clock:
    """Wall clock that tests move."""

    def __init__(self) -> None:
        self.now = 1_000_000_000.0

    def __call__(self) -> float:
        self.now += 0.000_001
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture(params=["memory", "embedded"])
async def small_store(request, tmp_path, clock):
    """A store with room for ten values of 100 kB."""
    if request.param == "memory":
        opened = MemoryStore(10 * (100_000 + ENTRY_OVERHEAD + 32), clock=clock)
    else:
        opened = EmbeddedStore(tmp_path, 10 * (25 * 4096 + 512), clock=clock)
    yield opened
    await opened.close()


def key_of(number: int) -> bytes:
    return number.to_bytes(32, "big")


async def test_the_least_recently_used_goes_first(small_store):
    for number in range(10):
        assert await small_store.put(key_of(number), bytes(100_000))
    await small_store.get(key_of(0))  # a use
    await small_store.contains(key_of(1))  # not a use
    for number in range(10, 13):
        assert await small_store.put(key_of(number), bytes(100_000))
    kept = [number for number in range(13) if await small_store.contains(key_of(number))]
    assert kept == [0, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    stats = small_store.stats()[0]
    assert (stats.evictions, stats.entries, stats.puts) == (3, 10, 13)


async def test_one_large_value_evicts_as_many_as_it_needs(small_store):
    for number in range(10):
        await small_store.put(key_of(number), bytes(100_000))
    assert await small_store.put(key_of(99), bytes(450_000))
    kept = [number for number in range(10) if await small_store.contains(key_of(number))]
    assert kept == [5, 6, 7, 8, 9]


async def test_a_value_over_the_budget_is_refused_and_evicts_nothing(small_store):
    await small_store.put(key_of(1), bytes(100_000))
    assert not await small_store.put(key_of(2), bytes(2_000_000))
    assert await small_store.contains(key_of(1))
    assert small_store.stats()[0].refused == 1


async def test_replacing_does_not_add_up(small_store):
    for _ in range(30):
        await small_store.put(key_of(1), bytes(100_000))
    stats = small_store.stats()[0]
    assert stats.entries == 1
    assert 100_000 <= stats.bytes < 110_000
    assert stats.evictions == 0


async def test_expired_values_make_room_before_others_are_evicted(small_store, clock):
    for number in range(10):
        await small_store.put(key_of(number), bytes(100_000), ttl=5 if number in (8, 9) else None)
    clock.now += 10
    assert await small_store.get(key_of(9)) is None
    await small_store.put(key_of(10), bytes(100_000))
    await small_store.put(key_of(11), bytes(100_000))
    assert small_store.stats()[0].evictions == 0
    assert await small_store.contains(key_of(0))
    await small_store.delete(key_of(0))
    assert small_store.stats()[0].entries == 9


async def test_deleting_returns_the_room(small_store):
    await small_store.put(key_of(1), bytes(100_000))
    await small_store.delete(key_of(1))
    assert (small_store.stats()[0].bytes, small_store.stats()[0].entries) == (0, 0)


async def test_uses_by_another_process_count(tmp_path):
    budget = 4 * (25 * 4096 + 512)
    store = EmbeddedStore(tmp_path, budget)
    for number in range(4):
        await store.put(key_of(number), bytes(100_000))
    script = (
        "import asyncio, sys\nfrom pathlib import Path\nfrom lookonce.core.stores.embedded import EmbeddedStore\n"
        f"async def main():\n store = EmbeddedStore(Path(sys.argv[1]), {budget})\n"
        " assert await store.get((0).to_bytes(32, 'big')) is not None\n await store.close()\nasyncio.run(main())"
    )
    await asyncio.to_thread(subprocess.run, [sys.executable, "-c", script, tmp_path], check=True, timeout=60)
    await store.put(key_of(4), bytes(100_000))
    assert await store.contains(key_of(0))
    assert not await store.contains(key_of(1))
    await store.close()


async def test_pinned_views_stay_intact_and_the_store_goes_on(tmp_path):
    store = open_store(f"file://{tmp_path}/s", max_bytes=8 * MIB)
    pinned = []
    for number in range(100):  # far more than the map holds while everything is pinned
        value = bytes([number]) * (4 * MIB)
        if await store.put(key_of(number), value):
            pinned.append((number, await store.get(key_of(number))))
    assert 2 <= len(pinned) < 100, "the map has an end"
    assert all(view[0] == number and view[-1] == number for number, view in pinned if view is not None)
    pinned.clear()
    assert await store.put(key_of(1000), bytes(4 * MIB)), "room comes back with the views"
    await store.close()


async def test_the_file_stays_within_its_bound(tmp_path):
    store = open_store(f"file://{tmp_path}/s", max_bytes=8 * MIB)
    rng = random.Random(1)
    for number in range(150):
        assert await store.put(key_of(number), bytes(rng.randrange(1000, 3 * MIB)))
    assert store.stats()[0].bytes <= 8 * MIB
    await store.close()
    assert (tmp_path / "s/embeddings/data.mdb").stat().st_size <= 40 * MIB


async def test_values_survive_a_restart(tmp_path):
    for _ in range(2):
        store = open_store(f"file://{tmp_path}/s")
        await store.put(b"key", b"value")
        await store.close()
    store = open_store(f"file://{tmp_path}/s")
    assert await store.get(b"key") == b"value"
    assert store.stats()[0].entries == 1
    await store.close()


async def test_two_stores_on_one_directory_in_one_process(tmp_path):
    first, second = open_store(f"file://{tmp_path}/s"), open_store(f"file://{tmp_path}/s")
    await first.put(b"key", b"value")
    await first.close()
    assert await second.get(b"key") == b"value"
    await second.close()


def test_only_the_owner_may_look(tmp_path):
    store = EmbeddedStore(tmp_path / "s", MIB)
    for path in (tmp_path / "s", *(tmp_path / "s").iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    store._shut()


def foreign(data):
    data.write_bytes(b"this is not an LMDB file" * 1000)


def empty(data):
    data.write_bytes(b"")


def truncated(data):
    os.truncate(data, data.stat().st_size // 2)


def scribbled(data):
    content = bytearray(data.read_bytes())
    for page in range(2, len(content) // 4096, 2):
        content[page * 4096 : page * 4096 + 64] = os.urandom(64)
    data.write_bytes(content)


def a_directory(data):
    data.unlink()
    data.mkdir()


@pytest.mark.parametrize("damage", [foreign, empty, truncated, scribbled, a_directory], ids=lambda f: f.__name__)
async def test_a_damaged_file_is_moved_aside(tmp_path, damage):
    url, directory = f"file://{tmp_path}/s", tmp_path / "s/embeddings"
    store = open_store(url)
    for number in range(50):
        await store.put(key_of(number), os.urandom(20_000))
    await store.close()
    damage(directory / "data.mdb")
    store = open_store(url)
    assert await store.put(b"key", b"value")
    assert await store.get(b"key") == b"value"
    assert await store.get(key_of(1)) is None
    await store.close()
    if damage is not empty:  # nothing of it to keep: LMDB takes an empty file for a new one
        assert (directory / "damaged/data.mdb").exists()


def test_a_directory_that_cannot_be_used_is_an_error_at_start(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(LookonceError) as caught:
        open_store(f"file://{tmp_path}/file/s")
    assert caught.value.kind is ErrorKind.INVALID_ARGUMENT
    assert caught.value.param == "store"


def _process(script: str, path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE)


async def test_a_stopped_holder_of_the_write_lock_costs_a_bounded_time(tmp_path):
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom lookonce.core.stores.lmdb_file import open_lmdb\n"
        "file = open_lmdb(Path(sys.argv[1]), 0)\n"
        "with file.env.begin(write=True):\n print('held', flush=True)\n time.sleep(600)"
    )
    store, hasty = EmbeddedStore(tmp_path, MIB), EmbeddedStore(tmp_path, MIB, operation_timeout=0.3)
    await store.put(b"key", b"value")
    with _process(script, tmp_path) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(StoreFailure):
            await hasty.put(b"other", b"value")
        assert await store.get(b"key") == b"value", "reads go on"
        holder.kill()  # the lock is robust: it passes to the next writer
    assert await store.put(b"third", b"value")
    await hasty.close()
    await store.close()


WRITER = """
import asyncio, itertools, os, sys
from lookonce.core.stores import open_store
from tests.stores.records import make_record

async def writer(store):
    for turn in itertools.count():
        if turn == 20:
            print("ready", flush=True)
        key = os.urandom(1) * 32  # 256 keys: replaced and evicted all the time
        await store.put(key, make_record(tokens=1 + os.urandom(2)[0] * 4, hidden=256, key=key).serialize())
        view = await store.get(os.urandom(1) * 32)
        if os.urandom(1)[0] < 40:
            await store.delete(os.urandom(1) * 32)

async def main():
    store = open_store("file://" + sys.argv[1], max_bytes=4 * 1024**2)
    await asyncio.gather(*(writer(store) for _ in range(8)))

asyncio.run(main())
"""


@pytest.mark.parametrize("kills", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_two_processes_killed_at_random_instants(tmp_path, kills):
    rng, path = random.Random(7), tmp_path / "s"

    def start() -> subprocess.Popen[bytes]:
        process = _process(WRITER, path)
        assert process.stdout.readline() == b"ready\n"
        return process

    writers = [start(), start()]
    try:
        for _ in range(kills):
            time.sleep(rng.uniform(0.05, 0.4))
            victim = rng.randrange(2)
            writers[victim].send_signal(signal.SIGKILL)
            writers[victim].communicate()
            writers[victim] = start()
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    assert verify(str(path / "embeddings/data.mdb"), subdir=False) == []
    assert not (path / "embeddings/damaged").exists(), "nothing was lost on the way"
    asyncio.run(_every_record_is_whole(path))


async def _every_record_is_whole(path) -> None:
    store = open_store(f"file://{path}", max_bytes=4 * MIB)
    found, used = 0, 0
    for number in range(256):
        view = await store.get(bytes([number]) * 32)
        if view is not None:
            parse_record(view, bytes([number]) * 32)  # raises RecordError when anything is amiss
            found, used = found + 1, used + (-(-(len(view) + 16) // 4096)) * 4096 + 512
    assert found >= 2
    await store.delete(bytes(range(32)))  # a write, of a key that no writer has
    stats = store.stats()[0]
    assert (stats.entries, stats.bytes) == (found, used), "the totals agree with what is there"
    assert await store.acquire(b"lease", b"me", 5)
    await store.close()
