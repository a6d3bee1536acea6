"""What every store promises, on every kind of store."""

from __future__ import annotations

import asyncio
import gc
import os
import time

import pytest

from lookonce.core.embedding_cache import EmbeddingCache
from lookonce.core.stores import EmbeddingStore, Leases, Store, open_store
from lookonce.core.stores.wrappers import SealedStore
from tests.stores.records import make_record


@pytest.fixture
async def store(store_url):
    opened = open_store(store_url)
    yield opened
    await opened.close()


def new_key() -> bytes:
    return os.urandom(32)


def test_is_a_store(store):
    assert isinstance(store, EmbeddingStore)
    assert isinstance(store, Leases)
    assert isinstance(store, Store)


async def test_answers(store):
    assert await store.ping() is True


async def test_put_get_contains_delete(store):
    key, value = new_key(), os.urandom(100_000)
    assert await store.get(key) is None
    assert not await store.contains(key)
    assert await store.put(key, value)
    assert await store.contains(key)
    view = await store.get(key)
    assert view.readonly
    assert view == value
    assert await store.delete(key)
    assert await store.get(key) is None
    assert not await store.contains(key)
    assert await store.delete(key), "absent counts as gone"


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
async def test_takes_bytes_like_values_of_all_sizes(store, kind):
    for size in (0, 1, 4095, 4_194_304):
        key, value = new_key(), os.urandom(size)
        assert await store.put(key, kind(value))
        assert await store.get(key) == value


async def test_put_replaces(store):
    key = new_key()
    await store.put(key, b"first")
    await store.put(key, b"second, longer")
    assert await store.get(key) == b"second, longer"


async def test_later_changes_to_the_buffer_do_not_reach_the_store(store):
    key, value = new_key(), bytearray(b"before")
    await store.put(key, value)
    value[:] = b"after!"
    assert await store.get(key) == b"before"


async def test_a_view_outlives_replacement_deletion_and_close(store_url):
    store = open_store(store_url)
    key, value = new_key(), os.urandom(1_000_000)
    await store.put(key, value)
    view = await store.get(key)
    part = view[10:20]
    await store.put(key, bytes(1_000_000))
    await store.delete(key)
    for _ in range(8):
        await store.put(new_key(), os.urandom(1_000_000))
    await store.close()
    assert view == value
    del view
    gc.collect()
    assert part == value[10:20]


async def lasts(seconds: float, begin, there) -> None:
    """What `begin` brings about is `there` for so many seconds, and then no more."""
    begun = time.monotonic()
    await begin()
    while await there():
        assert time.monotonic() < begun + 60, "it is still there"
        await asyncio.sleep(0.02)
    assert time.monotonic() >= begun + seconds - 0.01, "it went too early"


async def test_values_live_for_their_ttl(store):
    key, kept = new_key(), new_key()
    await store.put(kept, b"x", ttl=600)
    await lasts(0.2, lambda: store.put(key, b"x", ttl=0.2), lambda: store.contains(key))
    assert await store.get(key) is None
    assert await store.contains(kept)


async def test_the_stores_own_ttl(store_url):
    store = open_store(store_url, ttl=0.2)
    key, own = new_key(), new_key()
    await store.put(own, b"x", ttl=600)
    await lasts(0.2, lambda: store.put(key, b"x"), lambda: store.contains(key))
    assert await store.get(key) is None
    assert await store.get(own) == b"x"
    await store.close()


async def test_namespaces_are_apart(store_url):
    first, second = open_store(store_url), open_store(store_url, namespace="images")
    key = new_key()
    await first.put(key, b"embedding")
    await second.put(key, b"image")
    await second.acquire(key, b"a", 600)
    assert await first.get(key) == b"embedding"
    assert await second.get(key) == b"image"
    assert await first.acquire(key, b"b", 5)
    await first.close()
    await second.close()


async def test_a_lease_has_one_owner(store):
    name = new_key()
    assert await store.acquire(name, b"a", 600)
    assert not await store.acquire(name, b"b", 600)
    assert await store.acquire(name, b"a", 600), "its owner may renew it"
    await store.release(name, b"b")
    assert not await store.acquire(name, b"b", 600), "only its owner may give it back"
    await store.release(name, b"a")
    assert await store.acquire(name, b"b", 600)


async def test_a_lease_runs_out(store):
    name = new_key()

    async def held():
        return not await store.acquire(name, b"b", 600)

    await lasts(0.2, lambda: store.acquire(name, b"a", 0.2), held)
    assert not await store.acquire(name, b"a", 600)


async def test_close_twice_and_use_afterwards(store):
    await store.put(new_key(), b"x")
    await store.close()
    await store.close()
    assert await store.get(new_key()) is None


async def test_counts(store_url):
    store = open_store(store_url)
    key = new_key()
    await store.get(key)
    await store.put(key, b"x")
    await store.get(key)
    far = store.stats()[-1]
    near = store.stats()[0]
    assert (far.misses, far.puts, far.errors) == (1, 1, 0)
    assert near.hits == 1
    await store.close()


async def test_many_at_once(store):
    keys = [new_key() for _ in range(64)]
    assert all(await asyncio.gather(*(store.put(key, key * 1000) for key in keys)))
    views = await asyncio.gather(*(store.get(key) for key in keys))
    assert [bytes(view) for view in views] == [key * 1000 for key in keys]


async def test_discard_removes_that_value_and_no_other(store):
    key = new_key()
    await store.put(key, b"bad")
    assert await store.get(key) == b"bad"
    await store.put(key, b"good")
    await store.discard(key, b"bad")
    assert await store.get(key) == b"good"
    await store.discard(key, memoryview(b"good"))
    assert await store.get(key) is None
    await store.discard(new_key(), b"never there")


async def test_sealed_values_are_their_keys_own(store_url):
    plain = open_store(store_url)
    store, other = SealedStore(plain, "images"), SealedStore(plain, "lists")
    one, two, absent = new_key(), new_key(), new_key()
    values = {one: os.urandom(1000), two: os.urandom(300_000)}
    for key, value in values.items():
        assert await store.put(key, value)
    assert [await store.get(key) for key in values] == list(values.values())
    raw = {key: bytes(await plain.get(key) or b"") for key in values}
    assert await other.get(one) is None, "another namespace's"
    await store.put(one, values[one])
    for bad in (raw[two], values[one], raw[one][:-1], raw[one] + b"x", b"", b"x", raw[one][:31] + b"?" + raw[one][32:]):
        await plain.put(absent, bad)
        assert await store.get(absent) is None
        assert not await plain.contains(absent), "it was dropped"
    await plain.close()


async def test_a_sealed_value_is_discarded_by_its_plain_form(store_url):
    plain = open_store(store_url)
    store, key = SealedStore(plain, "images"), new_key()
    await store.put(key, b"value")
    await store.discard(key, b"another")
    assert await store.get(key) == b"value"
    await store.discard(key, b"value")
    assert await store.get(key) is None and not await plain.contains(key)
    await plain.close()


async def test_embedding_cache_drops_what_is_another_keys(store):
    cache, key, other = EmbeddingCache(store), new_key(), new_key()
    await cache.put(make_record(key=key))
    await store.put(other, bytes(await store.get(key)))
    assert await cache.get(other) is None
    assert cache.metrics.stats.corrupt == 1
    assert not await store.contains(other) and await cache.get(key) is not None


async def test_embedding_cache_drops_damaged_records(store):
    cache, key = EmbeddingCache(store), new_key()
    record = make_record(tokens=200, key=key)
    assert await cache.get(key) is None
    assert await cache.put(record)
    assert (await cache.get(key)).image_digest == record.image_digest
    damaged = bytearray(record.serialize())
    damaged[-1] ^= 1
    await store.put(key, bytes(damaged))
    assert await cache.get(key) is None
    assert cache.metrics.stats.corrupt == 1
    assert not await store.contains(key), "it was dropped"
    await cache.put(record)
    assert await cache.contains(key)
    assert await cache.forget([key, new_key()])
    assert await cache.get(key) is None


@pytest.mark.parametrize("kind", ["memory", "file", "tiered"])
async def test_a_store_that_does_not_evict_refuses_instead(kind, tmp_path):
    file = f"file://{tmp_path}/store"
    url = {"memory": "memory://", "file": file, "tiered": f"memory:// {file}"}[kind]
    store = open_store(url, max_bytes=40_000, evicts=False)
    keys = [new_key() for _ in range(4)]
    for key in keys:
        assert await store.put(key, bytes(8000))
    assert not await store.put(new_key(), bytes(8000))
    assert not await store.put(keys[0], bytes(20_000))
    assert await store.put(keys[0], bytes(7000)), "there is room for what takes the place of a larger one"
    for key in keys[1:]:
        assert await store.get(key) == bytes(8000)
    assert await store.get(keys[0]) == bytes(7000)
    assert await store.delete(keys[1])
    assert await store.put(new_key(), bytes(8000))
    await store.close()
