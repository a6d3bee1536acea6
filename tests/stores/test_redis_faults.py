"""Redis behind a proxy that resets, refuses, halves, garbles and delays, under the event loop that the gateway runs on:
every verb answers or fails as a store does, and the store is in use again once the server is."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter

import pytest
import uvloop

from lookonce.core.stores import StoreFailure, open_store
from lookonce.core.stores.memory import MemoryStore
from lookonce.core.stores.wrappers import CircuitBreaker
from tests.faulty_proxy import FAULTS, FaultyProxy
from tests.ports import free_port
from tests.valkey import ValkeyServer, one_node_cluster

QUICK = "connect_timeout=100ms&socket_timeout=100ms&operation_timeout=150ms"
FORMS = ["single", "cluster", "sentinel"]
KEY, OTHER = bytes(32), b"\1" * 32


@contextlib.contextmanager
def behind_a_proxy(form, folder):
    """URL of a store in that form, and the proxy that its every connection to the data goes through."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(one_node_cluster() if form == "cluster" else ValkeyServer())
        proxy = stack.enter_context(FaultyProxy(server.port, slow=0.02))
        if form == "cluster":
            with server.client() as client:
                client.config_set("cluster-announce-port", proxy.port)
            yield f"redis+cluster://127.0.0.1:{proxy.port}?{QUICK}", proxy
        elif form == "sentinel":
            config = folder / "sentinel.conf"
            monitor = f"sentinel monitor images 127.0.0.1 {proxy.port} 1"
            config.write_text(f"port {free_port()}\nbind 127.0.0.1\n{monitor}\n")
            watcher = stack.enter_context(ValkeyServer(config_file=config))
            yield f"redis+sentinel://127.0.0.1:{watcher.port}/images?{QUICK}", proxy
        else:
            yield f"redis://127.0.0.1:{proxy.port}?{QUICK}", proxy


def verbs(driver, size):
    """Every operation of a store, with the types it may answer."""
    return {
        "put": (lambda: driver.put(KEY, bytes(size)), bool),
        "get": (lambda: driver.get(KEY), memoryview | None),
        "contains": (lambda: driver.contains(KEY), bool),
        "delete": (lambda: driver.delete(OTHER), bool),
        "acquire": (lambda: driver.acquire(KEY, b"o" * 16, 5), bool),
        "release": (lambda: driver.release(KEY, b"o" * 16), None),
        "ping": (driver.ping, bool),
    }


async def use(driver, size, outcomes):
    for name, (call, kind) in verbs(driver, size).items():
        try:
            answer = await call()
        except StoreFailure:
            outcomes["failed"] += 1
        else:
            assert answer is None if kind is None else isinstance(answer, kind), (name, answer)
            outcomes["answered"] += 1


@pytest.mark.parametrize(
    "form", [form if form == "single" else pytest.param(form, marks=pytest.mark.slow) for form in FORMS]
)
def test_whatever_the_peer_does_is_an_answer_or_a_store_failure(form, tmp_path):
    async def campaign(url, proxy):
        store, outcomes, unhandled = open_store(url), Counter(), []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
        driver = store._driver
        for fault in FAULTS:
            proxy.fault = "none"
            with contextlib.suppress(StoreFailure):
                await driver.put(KEY, bytes(3000))
            proxy.fault = fault
            await asyncio.gather(*(use(driver, size, outcomes) for size in (10, 70_000)))
        proxy.fault = "mixed"
        for size in (10, 70_000) * 2:
            await asyncio.gather(*(use(driver, size, outcomes) for _ in range(8)))
            proxy.drop_all()
        assert outcomes["failed"] > 20 and outcomes["answered"] > 20, outcomes
        while not store.is_open:  # the guarded store: misses, and no exception ever
            proxy.fault = "reset"
            await store.get(KEY)
        proxy.fault = "none"
        deadline = time.monotonic() + 60
        while not await store.put(KEY, b"value"):
            assert time.monotonic() < deadline, "the store is never in use again"
            await asyncio.sleep(0.05)
        assert await store.get(KEY) == b"value"
        await store.close()
        assert not unhandled, unhandled

    with behind_a_proxy(form, tmp_path) as (url, proxy):
        uvloop.run(campaign(url, proxy))


@pytest.mark.parametrize(
    "url", ["redis://127.0.0.1:{}", "redis+cluster://127.0.0.1:{}", "redis+sentinel://127.0.0.1:{}/images"]
)
async def test_a_server_that_was_never_there_in_every_form(url):
    store = open_store(url.format(free_port()) + f"?{QUICK}")
    assert await store.get(KEY) is None
    assert await store.put(KEY, b"value") is False
    assert await store.acquire(KEY, b"me", 5) is True
    assert await store.delete(KEY) is False
    assert store.stats()[0].degraded
    await store.close()


class Broken(MemoryStore):
    """A driver that breaks its promise to raise nothing but StoreFailure."""

    error: Exception | None = StoreFailure("gone")

    async def ping(self):
        if self.error is not None:
            raise self.error
        return True

    async def get(self, key):
        await self.ping()
        return await super().get(key)


async def test_a_probe_that_fails_unforeseen_is_told_and_another_follows(capsys):
    driver = Broken(1000)
    breaker = CircuitBreaker(driver, threshold=1, first_backoff=0.01, max_backoff=0.02)
    assert await breaker.get(KEY) is None
    driver.error = RuntimeError("the handler is closed")
    await asyncio.sleep(0.02)
    deadline = time.monotonic() + 60
    while "probe of a store failed unforeseen" not in capsys.readouterr().out:
        assert await breaker.get(KEY) is None
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    errors = breaker.stats()[0].errors
    assert errors >= 2, "counted as what it is"
    driver.error = None
    while breaker.is_open:
        await breaker.get(KEY)
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    await breaker.close()
