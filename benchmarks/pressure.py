"""The gateway under pressure: how soon 500 clients that hang up free what they held, and how soon a client is told that
the language service is full. Targets: a second; 50 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx2

from benchmarks.gateway import BUNDLED, QUESTION, Connection, image_file, processes
from lookonce.core.rpc.client import LanguageClient

LONG = {"questions": [QUESTION], "max_tokens": 3000, "ignore_eos": True, "stream": True}
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(BUNDLED), help="checkpoint (default: the bundled one)")
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--refusals", type=int, default=300)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lookonce-bench-") as folder, processes(options.model, folder) as url:
        figures = asyncio.run(disconnects(url, folder, options.streams))
    bounds = ("--max-running", "4", "--max-waiting", "4")
    directory = tempfile.TemporaryDirectory(prefix="lookonce-bench-")
    with directory as folder, processes(options.model, folder, language=bounds) as url:
        figures |= asyncio.run(refusals(url, folder, options.refusals))
    for name, value in figures.items():
        print(f"{name:52}{value:>10.1f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))
    return 0


async def disconnects(url: str, folder: str, streams: int) -> dict[str, float]:
    """All streams under way, then all clients gone at once: until the language service holds none of them."""
    path, language = await questions_path(url), LanguageClient(f"unix:{folder}/lm.sock")
    clients = [await Client.begin(url, path) for _ in range(streams)]
    while True:
        state = await language.describe(timeout=60)
        if state.running + state.waiting >= streams:
            break
        await asyncio.sleep(0.02)
    started = time.perf_counter()
    for client in clients:
        client.close()
    while True:
        state = await language.describe(timeout=60)
        if not state.running + state.waiting:
            break
        await asyncio.sleep(0.005)
    freed = time.perf_counter() - started
    await language.close()
    return {f"{streams} clients gone until all places are free, ms": 1000 * freed}


async def refusals(url: str, folder: str, count: int) -> dict[str, float]:
    """A language service full of eight long answers; everyone else is answered 429."""
    path, language = await questions_path(url), LanguageClient(f"unix:{folder}/lm.sock")
    clients = [await Client.begin(url, path) for _ in range(8)]
    while (await language.describe(timeout=60)).waiting < 4:  # noqa: ASYNC110  # it has no event to wait for
        await asyncio.sleep(0.02)
    connection = await Connection.open(url)
    taken = []
    for _ in range(count):
        started = time.perf_counter()
        async for _ in connection.post("/v1/chat/completions", json.dumps(CHAT).encode(), status=429):
            pass
        taken.append(1000 * (time.perf_counter() - started))
        if (await language.describe(timeout=60)).waiting < 4:
            break
    connection.close()
    for client in clients:
        client.close()
    await language.close()
    return {
        "told that the service is full, p50, ms": statistics.median(taken),
        "told that the service is full, p99, ms": statistics.quantiles(taken, n=100)[-1],
    }


class Client:
    """Somebody who reads a long answer until they hang up."""

    def __init__(self, connection: Connection, reading: asyncio.Task[None]) -> None:
        self._connection, self._reading = connection, reading

    @classmethod
    async def begin(cls, url: str, path: str) -> Client:
        """Ask."""
        connection = await Connection.open(url)

        async def read() -> None:
            async for _ in connection.post(path, json.dumps(LONG).encode()):
                pass

        return cls(connection, asyncio.create_task(read()))

    def close(self) -> None:
        """Hang up."""
        self._reading.cancel()
        self._connection.close()


async def questions_path(url: str) -> str:
    """The route of questions about an image just uploaded."""
    async with httpx2.AsyncClient(base_url=url, timeout=60) as http:
        reply = await http.post("/v1/images", files={"file": ("a.png", image_file())})
        return f"/v1/images/{reply.raise_for_status().json()['id']}/questions"


if __name__ == "__main__":
    sys.exit(main())
