"""Warm questions through the whole system: what the gateway adds to the engine's own time, and how many a second.

Starts the three processes on an embedded store and asks about one image whose prefix is already held. Latency: one
one-token question at a time over REST, less the service's own time to first token (from the receipt). Throughput: many
one-token questions at once, through the gateway, interleaved with the same straight to the language service over gRPC;
and last, with the services gone, the same to the engine alone in this process.
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
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from PIL import Image

from lookonce.core.identity import EmbeddingReference
from lookonce.core.rpc.client import LanguageClient, VisionClient
from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
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
        figures |= asyncio.run(engine_alone(model, options))
    print(f"{'questions':30}{'median':>12}")
    for name, value in figures.items():
        print(f"{name:30}{value:>12.2f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))
    return 0


@contextlib.contextmanager
def processes(model: str, folder: str, *, language: Sequence[str] = ()) -> Iterator[str]:
    """The three services on unix sockets and an embedded store; yields the gateway's URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    store = ["--store", f"file://{folder}/store", "--log-level", "warning"]
    eyes, words = f"unix:{folder}/vision.sock", f"unix:{folder}/lm.sock"
    commands = [
        ["vision_service", "--model", model, "--listen", eyes, *store],
        ["lm_service", "--model", model, "--listen", words, "--vision", eyes, *store, *language],
        ["gateway", "--port", str(port), "--vision", eyes, "--lm", words, *store],
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


class Connection:
    """One HTTP/1.1 connection, kept open. A full client takes as long as the gateway does, on the same cores."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, url: str) -> Connection:
        """Connect to http://host:port."""
        host, _, port = url.removeprefix("http://").partition(":")
        return cls(*await asyncio.open_connection(host, int(port)))

    async def post(self, path: str, body: bytes, *, status: int = 200) -> AsyncIterator[bytes]:
        """Send JSON; the pieces of the answer's body as they come. Raises when the answer has another status."""
        head = (
            f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        )
        self._writer.write(head.encode() + b"\r\n\r\n" + body)
        first, *lines = (await self._reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
        headers = dict(line.split(b": ", 1) for line in lines if line)
        if b" %d" % status not in first:
            raise RuntimeError(first.decode())
        if b"content-length" in headers:
            yield await self._reader.readexactly(int(headers[b"content-length"]))
            return
        while size := int(await self._reader.readuntil(b"\r\n"), 16):
            yield (await self._reader.readexactly(size + 2))[:-2]
        await self._reader.readexactly(2)

    def close(self) -> None:
        """Close it."""
        self._writer.close()


async def measure(url: str, folder: str, options: argparse.Namespace) -> dict[str, float]:
    """Latency first, then rounds of throughput: gateway, language service, one call of many questions."""
    file = image_file()
    async with httpx2.AsyncClient(base_url=url, timeout=60) as http:
        image = (await http.post("/v1/images", files={"file": ("a.png", file)})).raise_for_status().json()["id"]
    connections = [await Connection.open(url) for _ in range(options.concurrency)]
    latency = [await overhead(connections[0], image) for _ in range(options.questions)][options.questions // 10 :]
    vision, language = VisionClient(f"unix:{folder}/vision.sock"), LanguageClient(f"unix:{folder}/lm.sock")
    reference = (await vision.encode(vision_pb2.EncodeRequest(image=file))).reference
    request = generate_request(reference)
    path, one, many = f"/v1/images/{image}/questions", body(1), body(options.questions)

    async def by_gateway(worker: int) -> None:
        async for _ in connections[worker].post(path, one):
            pass

    async def by_grpc(_: int) -> None:
        async for _ in language.generate(request, timeout=60):
            pass

    rates: dict[str, list[float]] = {"gateway": [], "grpc": [], "one call": []}
    for _ in range(options.rounds):
        rates["gateway"].append(await rate(by_gateway, options))
        rates["grpc"].append(await rate(by_grpc, options))
        started = time.perf_counter()
        async for _ in connections[0].post(path, many):
            pass
        rates["one call"].append(options.questions / (time.perf_counter() - started))
    for connection in connections:
        connection.close()
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


async def engine_alone(model: str, options: argparse.Namespace) -> dict[str, float]:
    """The same questions to the engine in this process, their prompts ready: no template, no gRPC, no HTTP."""
    import torch

    from lm_service.app import load  # torch: only now that the services are gone
    from lm_service.engine.types import EmbeddingSource, Generation, Sampling
    from lm_service.prompt import Message, PromptBuilder
    from lm_service.settings import LanguageSettings

    loaded = load(LanguageSettings(model=model))
    engine = loaded.engine
    checkpoint, template = loaded.checkpoint, loaded.template
    merged = 224 // 14 // checkpoint.merge_size
    digest = b"\0" * 32
    grid = (1, merged * checkpoint.merge_size, merged * checkpoint.merge_size)
    reference = EmbeddingReference(digest, "0" * 64, digest, grid, merged * merged, 224, 224)
    builder = PromptBuilder(
        template,
        checkpoint.family,
        checkpoint.config,
        context_length=engine.describe().model.context_length,
        max_images=1,
        check_fingerprint=lambda _: None,
    )
    prompt = builder.build([Message("user", (reference, QUESTION))])

    class Noise:
        async def load(self, reference: EmbeddingReference, rows_of: Any) -> tuple[Any, EmbeddingSource]:
            rows = np.random.default_rng(0).standard_normal((reference.tokens, checkpoint.hidden_size))
            return torch.tensor(rows, dtype=torch.float32), EmbeddingSource.TENSOR_CACHE

    await engine.start(Noise())

    async def ask(_: int) -> None:
        async for _ in engine.generate(Generation("", prompt, Sampling(1))):
            pass

    rates = [await rate(ask, options) for _ in range(options.rounds + 1)][1:]
    await engine.close()
    return {"a second, engine alone": statistics.median(rates)}


def generate_request(reference: EmbeddingReference) -> language_pb2.GenerateRequest:
    """One one-token question."""
    message = language_pb2.Message(role="user")
    message.parts.add().image.CopyFrom(reference.to_proto())
    message.parts.add().text = QUESTION
    sampling = language_pb2.SamplingParameters(max_tokens=1)
    return language_pb2.GenerateRequest(messages=[message], sampling=sampling)


def body(count: int) -> bytes:
    """A request of `count` one-token questions."""
    return json.dumps({"questions": [QUESTION] * count, "max_tokens": 1}).encode()


async def overhead(connection: Connection, image: str) -> float:
    """Milliseconds of one streamed question until its first token, less the engine's own time to first token."""
    message = {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": f"lookonce:{image}"}},
            {"type": "text", "text": QUESTION},
        ],
    }
    request = json.dumps({"model": "lookonce", "messages": [message], "max_tokens": 1, "stream": True}).encode()
    started, first, engine = time.perf_counter(), 0.0, 0.0
    async for piece in connection.post("/v1/chat/completions", request):
        now = time.perf_counter()
        for line in piece.splitlines():
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line.removeprefix(b"data: "))
            delta = event["choices"][0]["delta"] if event["choices"] else {}
            if not first and delta.get("content"):
                first = now
            engine = event.get("receipt", {}).get("ttft_ms", engine)
    return 1000 * ((first or time.perf_counter()) - started) - engine


async def rate(ask: Callable[[int], Awaitable[None]], options: argparse.Namespace) -> float:
    """Questions a second at the asked-for concurrency."""
    left = iter(range(options.questions))

    async def worker(number: int) -> None:
        for _ in left:
            await ask(number)

    started = time.perf_counter()
    await asyncio.gather(*(worker(number) for number in range(options.concurrency)))
    return options.questions / (time.perf_counter() - started)


def image_file() -> bytes:
    """A PNG of noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(main())
