"""Redis dead, slow, restarted, full, guarded by ACL, behind Sentinel: misses and bounded time, never an error."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import pytest

from lookonce.core.stores import StoreFailure, open_store
from lookonce.core.stores.memory import MemoryStore
from lookonce.core.stores.wrappers import CircuitBreaker
from tests.ports import free_port
from tests.valkey import PATIENT, ValkeyServer

QUICK = "connect_timeout=200ms&socket_timeout=200ms&operation_timeout=500ms"
"""For servers that don't answer. One that does may still be slower now and then, on a busy machine."""


async def until(condition, seconds: float = 60.0) -> None:
    """Wait until `condition()` (a coroutine) is true."""
    give_up = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < give_up, "it did not happen"
        await asyncio.sleep(0.05)


async def use_all(store) -> None:
    """Every operation of a store that is out of order."""
    assert await store.get(b"key") is None
    assert await store.put(b"key", b"value") is False
    assert await store.contains(b"key") is False
    assert await store.acquire(b"lease", b"me", 5) is True
    await store.release(b"lease", b"me")
    assert await store.delete(b"key") is False, "not known to be gone"
    assert await store.ping() is False


async def test_a_server_that_was_never_there():
    store = open_store(f"redis://127.0.0.1:{free_port()}?{QUICK}")
    await use_all(store)
    assert store.stats()[0].degraded
    await store.close()


async def test_killed_and_restarted(own_valkey):
    store = open_store(f"{own_valkey.url}?{PATIENT}")
    assert await store.put(b"key", b"value")
    own_valkey.kill()
    await use_all(store)
    own_valkey.start(own_valkey.port)

    async def works_again():
        return await store.put(b"key", b"value")

    await until(works_again)
    assert await store.get(b"key") == b"value"
    assert not store.stats()[0].degraded
    await store.close()


async def test_a_restart_between_two_requests_goes_unnoticed(own_valkey):
    store = open_store(f"{own_valkey.url}?{PATIENT}")
    await asyncio.gather(*(store.put(bytes([n]), b"value") for n in range(8)))
    own_valkey.restart()
    assert await asyncio.gather(*(store.put(bytes([n]), b"value") for n in range(8))) == [True] * 8
    assert store.stats()[0].errors == 0
    await store.close()


async def test_stopped_and_resumed(own_valkey):
    store = open_store(own_valkey.url + "?" + QUICK)

    async def put():
        return await store.put(b"key", b"value")

    await until(put)
    own_valkey.stop()
    await use_all(store)
    assert store.stats()[0].degraded
    own_valkey.resume()

    async def works_again():
        return await store.get(b"key") is not None

    await until(works_again)
    await store.close()


async def test_an_open_circuit_does_not_touch_the_server(own_valkey):
    store = open_store(own_valkey.url + "?" + QUICK)
    own_valkey.stop()
    while not store.is_open:
        await store.get(b"key")
    errors = store.stats()[0].errors
    tasks = [asyncio.ensure_future(store.get(b"key")) for _ in range(1000)]
    await asyncio.sleep(0)
    assert all(task.done() for task in tasks), "answered within one turn of the loop, without any wait"
    assert store.stats()[0].errors == errors
    await store.close()


async def test_full_without_eviction():
    with ValkeyServer(maxmemory="8mb", maxmemory_policy="noeviction") as server:
        store = open_store(f"{server.url}?{PATIENT}")
        kept = [await store.put(bytes([n]), bytes(2_000_000)) for n in range(6)]
        assert kept[0] is True
        assert kept[-1] is False
        assert store.stats()[0].errors > 0
        await store.close()


async def test_full_with_eviction():
    with ValkeyServer(maxmemory="16mb", maxmemory_policy="allkeys-lru") as server:
        store = open_store(f"{server.url}?{PATIENT}")
        assert all([await store.put(bytes([n]), bytes(2_000_000)) for n in range(20)])
        kept = [await store.contains(bytes([n])) for n in range(20)]
        assert kept[-1]
        assert 1 < sum(kept) < 9, "which ones is the server's choice"
        await store.close()


async def test_a_value_over_the_limit_is_refused(valkey):
    store = open_store(f"{valkey.url}?max_value_bytes=1KiB&{PATIENT}")
    assert not await store.put(b"large", bytes(1025))
    assert await store.put(b"fits", bytes(1024))
    assert (store.stats()[0].refused, store.stats()[0].errors) == (1, 0)
    await store.close()


async def test_what_is_no_lease_holds_nobody_up(valkey):
    store, name = open_store(f"{valkey.url}?{PATIENT}"), b"\7" * 32
    with valkey.client() as client:
        lease = f"lookonce:embeddings:lease:{name.hex()}"
        for value, milliseconds in ((b"x" * 16, None), (b"x" * 4_000_000, None), (b"x", 86_400_000)):
            client.set(lease, value, px=milliseconds)
            assert await store.acquire(name, b"me", 5), "it has no end, or none that a lease may have"
            assert 0 < client.pttl(lease) <= 5000
    assert not await store.acquire(name, b"another", 5)
    await store.close()


async def test_a_value_of_another_type_is_a_miss_and_makes_room(valkey):
    store, key = open_store(f"{valkey.url}?{PATIENT}"), b"\6" * 32
    with valkey.client() as client:
        for _ in range(5):
            client.rpush(f"lookonce:embeddings:{key.hex()}", b"one", b"two")
            assert await store.get(key) is None
            assert not await store.contains(key)
    assert (store.stats()[0].corrupt, store.stats()[0].errors) == (5, 0)
    await store.close()


async def test_acl_user_limited_to_our_keys():
    with ValkeyServer() as server:
        with server.client() as admin:
            admin.execute_command(
                "ACL", "SETUSER", "lookonce", "on", ">p@ss/word", "~lookonce:*", "-@all",
                "+get", "+set", "+exists", "+unlink", "+del", "+eval", "+client|setinfo", "+ping", "+select",
            )  # fmt: skip
            admin.execute_command("ACL", "SETUSER", "default", "off")
        store = open_store(f"redis://lookonce:p%40ss%2Fword@127.0.0.1:{server.port}/0?{PATIENT}")
        assert await store.put(b"key", b"value")
        assert await store.get(b"key") == b"value"
        assert await store.acquire(b"lease", b"a", 5)
        assert not await store.acquire(b"lease", b"b", 5)
        await store.release(b"lease", b"a")
        assert await store.delete(b"key")
        await store.close()
        wrong = open_store(f"redis://lookonce:wrong@127.0.0.1:{server.port}")
        assert await wrong.put(b"key", b"value") is False
        await wrong.close()


async def test_tls_with_a_certificate_that_is_not_trusted(tls_front):
    store = open_store(f"rediss://127.0.0.1:{tls_front.port}")
    assert await store.put(b"key", b"value") is False
    assert await store.ping() is False
    await store.close()


async def test_sentinel(tmp_path):
    with ValkeyServer() as master:
        config = tmp_path / "sentinel.conf"
        port = free_port()
        config.write_text(f"port {port}\nbind 127.0.0.1\nsentinel monitor images 127.0.0.1 {master.port} 1\n")
        with ValkeyServer(config_file=config) as watcher:
            store = open_store(f"redis+sentinel://127.0.0.1:{watcher.port}/images?ttl=1h&{PATIENT}")
            assert await store.put(b"key", b"value")
            assert await store.get(b"key") == b"value"
            with master.client() as client:
                assert 0 < client.ttl("lookonce:embeddings:" + b"key".hex()) <= 3600
            await store.close()


class Moody(MemoryStore):
    """A driver that fails on demand."""

    failing = False
    calls = 0

    async def get(self, key):
        self.calls += 1
        if self.failing:
            raise StoreFailure("moody")
        return await super().get(key)

    async def ping(self):
        return (await self.get(b"ping")) is None


async def test_breaker_opens_after_failures_in_a_row_and_probes_in_the_background(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("lookonce.core.stores.wrappers.time", SimpleNamespace(monotonic=lambda: now[0]))
    driver = Moody(1000)
    breaker = CircuitBreaker(driver, threshold=3, first_backoff=0.05, max_backoff=0.1)
    for failing in (True, True, False, True, True):
        driver.failing = failing
        await breaker.get(b"key")
    assert not breaker.is_open, "failures with a success between them don't count together"
    await breaker.get(b"key")
    assert breaker.is_open
    calls = driver.calls
    for _ in range(10):
        assert await breaker.get(b"key") is None
    assert driver.calls == calls
    now[0] += 0.06
    await breaker.get(b"key")
    await asyncio.sleep(0)
    assert driver.calls == calls + 1, "one probe"
    assert breaker.is_open
    driver.failing = False

    async def closed():
        now[0] += 0.06
        await breaker.get(b"key")
        return not breaker.is_open

    await until(closed)
    await breaker.close()


async def test_breaker_still_tries_to_delete():
    driver = Moody(1000)
    breaker = CircuitBreaker(driver, threshold=1)
    await breaker.put(b"key", b"value")
    driver.failing = True
    await breaker.get(b"key")
    assert breaker.is_open
    assert await breaker.delete(b"key"), "erasure is not skipped to save time"


@pytest.mark.parametrize("times", [1, 3])
async def test_closing_closes_every_connection(times):
    with ValkeyServer() as server:
        for _ in range(times):
            store = open_store(f"{server.url}?{PATIENT}")
            await asyncio.gather(*(store.put(bytes([n]), b"x") for n in range(10)))
            await store.close()
        with server.client() as client:

            async def all_closed():  # the server notices a moment later
                return len(client.client_list()) == 1

            await until(all_closed)
