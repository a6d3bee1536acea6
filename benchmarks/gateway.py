"""Warm questions through the whole system: what the gateway adds to the engine's own time, and how many a second.

Starts the three processes on an embedded store and asks about one picture whose prefix is already held. Latency: one
one-token question at a time over REST, less the service's own time to first token (from the receipt). Throughput: many
one-token questions at once, through the gateway and, interleaved, straight to the language service over gRPC.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from PIL import Image

from lookonce.checkpoint.random import make_random_checkpoint
from lookonce.rpc.client import LanguageClient, VisionClient
from lookonce.rpc.convert import reference_to_proto
from protos.lookonce.v1 import language_pb2, vision_pb2

BUNDLED = Path(__file__).resolve().parent.parent / "lookonce/data/shapes"
QUESTION = "How many circles are there?"


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint (default: the bundled one)")
    parser.add_argument("--questions", type=int, default=300, help="in each round (default: 300)")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lookonce-bench-") as folder:
        model = options.model or (
            str(BUNDLED) if BUNDLED.is_dir() else str(make_random_checkpoint(Path(folder, "model"), size="small"))
        )
        with processes(model, folder) as url:
            figures = asyncio.run(measure(url, folder, options))
    print(f"{'questions':30}{'median':>12}")
    for name, value in figures.items():
        print(f"{name:30}{value:>12.2f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))
    return 0


@contextlib.contextmanager
def processes(model: str, folder: str) -> Iterator[str]:
    """The three services on unix sockets and an embedded store; yields the gateway's URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    store = ["--store", f"file://{folder}/store", "--log-level", "warning"]
    vision, language = f"unix:{folder}/vision.sock", f"unix:{folder}/lm.sock"
    commands = [
        ["vision_service", "--model", model, "--listen", vision, *store],
        ["lm_service", "--model", model, "--listen", language, "--vision", vision, *store],
        ["gateway", "--port", str(port), "--vision", vision, "--lm", language, *store],
    ]
    running = [subprocess.Popen([sys.executable, "-m", *command], env=os.environ) for command in commands]
    try:
        url = f"http://127.0.0.1:{port}"
        while any(process.poll() is None for process in running):
            with contextlib.suppress(httpx2.TransportError):
                if httpx2.get(f"{url}/readyz").status_code == 200:
                    break
            time.sleep(0.2)
        yield url
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


async def measure(url: str, folder: str, options: argparse.Namespace) -> dict[str, float]:
    """Latency first, then rounds of throughput, gateway and language service in turn."""
    async with httpx2.AsyncClient(base_url=url, timeout=60, limits=httpx2.Limits(max_connections=64)) as http:
        picture = picture_file()
        image = (await http.post("/v1/images", files={"file": ("a.png", picture)})).raise_for_status().json()["id"]
        latency = [await overhead(http, image) for _ in range(options.questions)][options.questions // 10 :]
        vision, language = VisionClient(f"unix:{folder}/vision.sock"), LanguageClient(f"unix:{folder}/lm.sock")
        reference = (await vision.encode(vision_pb2.EncodeRequest(image=picture))).reference
        message = language_pb2.Message(role="user")
        message.parts.add().image.CopyFrom(reference_to_proto(reference))
        message.parts.add().text = QUESTION
        sampling = language_pb2.SamplingParameters(max_tokens=1)
        request = language_pb2.GenerateRequest(messages=[message], sampling=sampling)

        async def by_gateway() -> None:
            (await http.post(f"/v1/images/{image}/questions", json=body(1))).raise_for_status()

        async def by_grpc() -> None:
            async for _ in language.generate(request, timeout=60):
                pass

        rates: dict[str, list[float]] = {"gateway": [], "grpc": [], "one call": []}
        for _ in range(options.rounds):
            rates["gateway"].append(await rate(by_gateway, options))
            rates["grpc"].append(await rate(by_grpc, options))
            started = time.perf_counter()
            reply = await http.post(f"/v1/images/{image}/questions", json=body(options.questions))
            reply.raise_for_status()
            rates["one call"].append(options.questions / (time.perf_counter() - started))
        await vision.close()
        await language.close()
    return {
        "overhead p50, ms": statistics.median(latency),
        "overhead p90, ms": statistics.quantiles(latency, n=10)[-1],
        "a second, gateway": statistics.median(rates["gateway"]),
        "a second, one call of many": statistics.median(rates["one call"]),
        "a second, service alone": statistics.median(rates["grpc"]),
        "gateway / service alone": statistics.median(
            one / other for one, other in zip(rates["gateway"], rates["grpc"], strict=True)
        ),
    }


def body(count: int) -> dict[str, Any]:
    """A request of `count` one-token questions."""
    return {"questions": [QUESTION] * count, "max_tokens": 1}


async def overhead(http: httpx2.AsyncClient, image: str) -> float:
    """Milliseconds of one streamed question until its first event, less the engine's own time to first token."""
    message = {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": f"lookonce:{image}"}},
            {"type": "text", "text": QUESTION},
        ],
    }
    request = {"model": "lookonce", "messages": [message], "max_tokens": 1, "stream": True}
    started, first, engine = time.perf_counter(), 0.0, 0.0
    async with http.stream("POST", "/v1/chat/completions", json=request) as reply:
        reply.raise_for_status()
        async for event in events(reply):
            delta = event["choices"][0]["delta"] if event["choices"] else {}
            if not first and delta.get("content") is not None and delta["content"] != "":
                first = time.perf_counter()
            engine = event.get("receipt", {}).get("ttft_ms", engine)
    return 1000 * ((first or time.perf_counter()) - started) - engine


async def events(reply: httpx2.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each server-sent event."""
    async for line in reply.aiter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


async def rate(ask: Any, options: argparse.Namespace) -> float:
    """Questions a second at the asked-for concurrency."""
    left = iter(range(options.questions))

    async def worker() -> None:
        for _ in left:
            await ask()

    started = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(options.concurrency)))
    return options.questions / (time.perf_counter() - started)


def picture_file() -> bytes:
    """A PNG of noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(main())
