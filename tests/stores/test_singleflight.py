"""Single flight: one makes, all get it; across tasks, across processes, across deaths; and erasure while it is under
way."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time

import pytest

from lookonce.core.single_flight import SingleFlight
from lookonce.core.stores import open_store
from lookonce.core.stores.memory import MemoryStore
from tests.valkey import PATIENT


class Work:
    """A value made at `gate`, kept in a store; counts what happens."""

    def __init__(self, store=None) -> None:
        self.store = store or MemoryStore(1 << 20)
        self.flights = SingleFlight(self.store, lease_seconds=0.3)
        self.gate = asyncio.Event()
        self.save_gate = asyncio.Event()
        self.save_gate.set()
        self.started = asyncio.Event()
        self.saving = asyncio.Event()
        self.made = self.cancelled = 0
        self.error = None

    async def load(self):
        value = await self.store.get(b"key")
        return None if value is None else bytes(value)

    async def make(self):
        self.made += 1
        self.started.set()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error:
            raise self.error
        return b"made %d" % self.made

    async def save(self, value):
        await self.store.put(b"key", value)
        self.saving.set()
        await self.save_gate.wait()

    async def discard(self):
        await self.store.delete(b"key")

    def forget(self, key):
        return self.flights.forget_if(lambda flight: flight.key == key)

    def ask(self, key=b"key", label=None, **options):
        calls = {"load": self.load, "make": self.make, "save": self.save, "discard": self.discard}
        return asyncio.ensure_future(self.flights.run(key, **calls, label=label, **options))


async def until(condition) -> None:
    """Let others run until `condition()`."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  # any condition
            await asyncio.sleep(0.005)


async def test_a_hundred_at_once_make_one():
    work = Work()
    asks = [work.ask() for _ in range(100)]
    await work.started.wait()
    work.gate.set()
    answers = await asyncio.gather(*asks)
    assert work.made == 1
    assert {value for value, _ in answers} == {b"made 1"}
    assert sorted(how for _, how in answers) == ["coalesced"] * 99 + ["miss"]
    assert await work.ask() == (b"made 1", "hit")
    assert work.flights.under_way == 0


async def test_different_keys_do_not_wait_for_each_other():
    work = Work()
    first = work.ask()
    await work.started.wait()
    second = work.ask(b"other key")
    await until(lambda: work.made == 2)
    work.gate.set()
    await asyncio.gather(first, second)


async def test_the_callers_of_a_cancelled_leader_get_their_value():
    work = Work()
    leader, follower = work.ask(), work.ask()
    await work.started.wait()
    leader.cancel()
    await asyncio.gather(leader, return_exceptions=True)
    work.gate.set()
    assert (await follower)[0] == b"made 1"
    assert (work.made, work.cancelled) == (1, 0)


async def test_work_stops_when_the_last_caller_goes_away():
    work = Work()
    asks = [work.ask(), work.ask()]
    await work.started.wait()
    for ask in asks:
        ask.cancel()
    await asyncio.gather(*asks, return_exceptions=True)
    await until(lambda: work.flights.under_way == 0)
    assert work.cancelled == 1
    work.gate.set()
    assert await work.ask() == (b"made 2", "miss"), "the lease was given back"


async def test_work_worth_keeping_goes_on_when_the_last_caller_goes_away():
    work = Work()
    ask = work.ask(keep=lambda: True)
    await work.started.wait()
    ask.cancel()
    await asyncio.gather(ask, return_exceptions=True)
    joined = work.ask()
    await asyncio.sleep(0)
    work.gate.set()
    assert await joined == (b"made 1", "coalesced") and work.cancelled == 0


async def test_an_exception_reaches_all_and_is_not_kept():
    work = Work()
    work.error = ValueError("no")
    asks = [work.ask() for _ in range(5)]
    work.gate.set()
    assert [type(e) for e in await asyncio.gather(*asks, return_exceptions=True)] == [ValueError] * 5
    assert work.made == 1
    work.error = None
    assert await work.ask() == (b"made 2", "miss")


async def test_a_dead_lease_holder_is_replaced():
    work = Work()
    await work.store.acquire(b"key", b"a process that died", 0.3)
    work.gate.set()
    assert await work.ask() == (b"made 1", "miss")


async def test_a_lease_is_renewed_while_its_holder_works():
    work = Work()
    ask = work.ask()
    await work.started.wait()
    await asyncio.sleep(0.7)  # more than twice the lease
    assert not await work.store.acquire(b"key", b"another", 1)
    work.gate.set()
    await ask
    assert await work.store.acquire(b"key", b"another", 1), "given back at the end"


async def test_a_follower_of_another_process_gets_its_value():
    work = Work()
    await work.store.acquire(b"key", b"another process", 600)
    ask = work.ask()
    await asyncio.sleep(0.05)
    await work.store.put(b"key", b"made there")
    assert await ask == (b"made there", "coalesced")
    assert work.made == 0


async def test_forgotten_while_made():
    work = Work()
    ask = work.ask()
    await work.started.wait()
    assert await work.forget(b"key") == 1
    later = work.ask()
    work.gate.set()
    assert await ask == (b"made 1", "miss"), "its caller still gets it"
    assert await later == (b"made 2", "miss"), "who asks afterwards starts afresh"
    assert await work.load() == b"made 2"


async def test_forgotten_while_made_leaves_nothing():
    work = Work()
    ask = work.ask()
    await work.started.wait()
    await work.forget(b"key")
    work.gate.set()
    await ask
    assert await work.load() is None and not work.saving.is_set(), "not even for a moment"


async def test_forgotten_while_saved_leaves_nothing():
    work = Work()
    work.gate.set()
    work.save_gate.clear()
    ask = work.ask()
    await work.saving.wait()
    assert await work.load() is not None
    forget = asyncio.ensure_future(work.forget(b"key"))
    await asyncio.sleep(0.02)
    assert not forget.done(), "not before it is gone"
    work.save_gate.set()
    assert await forget == 1
    assert await work.load() is None
    assert (await ask)[0] == b"made 1"


async def test_forgotten_while_saved_and_its_caller_gone_leaves_nothing():
    work = Work()
    work.gate.set()
    work.save_gate.clear()
    ask = work.ask()
    await work.saving.wait()
    forget = asyncio.ensure_future(work.forget(b"key"))
    await asyncio.sleep(0)
    ask.cancel()
    await forget
    assert await work.load() is None


async def test_forget_by_label():
    work = Work()
    asks = [work.ask(b"1", "cat"), work.ask(b"2", "dog")]
    await work.started.wait()
    assert await work.flights.forget_if(lambda flight: flight.label == "cat") == 1
    assert await work.forget(b"3") == 0
    work.gate.set()
    await asyncio.gather(*asks)


async def test_without_a_working_store_everybody_is_served(own_valkey):
    own_valkey.kill()
    store = open_store(f"{own_valkey.url}?{PATIENT}")
    work = Work(store)
    work.gate.set()
    assert await work.ask() == (b"made 1", "miss")
    assert await work.ask() == (b"made 2", "miss")
    await store.close()


PROCESS = """
import asyncio, os, sys
from lookonce.core.single_flight import SingleFlight
from lookonce.core.stores import open_store

async def main():
    store, log = open_store(sys.argv[1]), sys.argv[2]
    flights = SingleFlight(store, lease_seconds=float(sys.argv[4]))

    async def load():
        value = await store.get(b"key")
        return None if value is None else bytes(value)

    async def make():
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\\n")
        await asyncio.sleep(float(sys.argv[3]))
        return b"value of " + str(os.getpid()).encode()

    async def save(value):
        await store.put(b"key", value)

    async def discard():
        await store.delete(b"key")

    print("ready", flush=True)
    sys.stdin.readline()
    asks = (flights.run(b"key", load=load, make=make, save=save, discard=discard) for _ in range(20))
    values = {bytes(value) for value, _ in await asyncio.gather(*asks)}
    await store.close()
    print(*values, sep="", flush=True)

asyncio.run(main())
"""


def spawn(url: str, log, seconds: float, lease: float) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", PROCESS, url, str(log), str(seconds), str(lease)]
    return subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ready(process: subprocess.Popen[str]) -> None:
    """Wait until it may be told to go."""
    assert process.stdout.readline() == "ready\n"


@pytest.fixture(params=["embedded", "redis"])
def shared_url(request, tmp_path):
    if request.param == "embedded":
        return f"file://{tmp_path}/store"
    server = request.getfixturevalue("own_valkey")
    return f"{server.url}?{PATIENT}"


def test_three_processes_make_one(shared_url, tmp_path):
    log = tmp_path / "made"
    processes = [spawn(shared_url, log, 0.3, lease=60) for _ in range(3)]
    for process in processes:
        ready(process)
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    values = {process.communicate(timeout=180)[0] for process in processes}
    assert log.read_text().count("\n") == 1
    assert values == {f"b'value of {log.read_text().strip()}'\n"}


def test_a_maker_killed_at_work_is_replaced(shared_url, tmp_path):
    log = tmp_path / "made"
    first, second = spawn(shared_url, log, 600, lease=1), spawn(shared_url, log, 0, lease=1)
    ready(first)
    first.stdin.write("go\n")
    first.stdin.flush()
    give_up = time.monotonic() + 60
    while not log.exists() and time.monotonic() < give_up:
        time.sleep(0.01)
    ready(second)
    second.stdin.write("go\n")
    second.stdin.flush()
    first.kill()
    first.communicate()
    assert second.communicate(timeout=180)[0] == f"b'value of {second.pid}'\n"
    assert log.read_text().split() == [str(first.pid), str(second.pid)]
