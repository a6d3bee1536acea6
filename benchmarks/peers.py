"""Ours beside vLLM: one run, one machine, one checkpoint, the same images, the same threads, one side after the other.

Four sides: `ours` (gateway, vision service, packed engine), `ours+vllm` (the same with vLLM as the engine), `vllm` (a
stock server with its own encoder) and `vllm+store` (a stock server that reads our store by lookonce-vllm). Scenes:
start; the first question about an image; warm questions; 16 at once; 32 questions about a new image in one go; back to
an earlier image after eight others; the first question of a new replica about an image that was asked about before.

Each side is asked in the way that is best for it: ours by the image's id, vLLM by its uuid once it has seen the image.
Answers are compared across sides. Needs the environment of scripts/setup_vllm.sh; without it only `ours` runs.

Usage: python -m benchmarks.peers [--model qwen2-vl-50m] [--side 672] [--rounds 5] [--sides ours vllm] [--json FILE]
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
from PIL import Image

from benchmarks.checkpoints import HELP, checkpoint_at
from tests.ports import free_port
from tests.processes import ServiceProcess
from tests.system.cluster import GatewayProcess
from tests.valkey import ValkeyServer
from tests.vllm.stock import PYTHON, environment, transfer

TOKENS, START_SECONDS = 16, 300.0
KV = "512MiB"
SIDES = ("ours", "ours+vllm", "vllm", "vllm+store")


def photograph(seed: int, side: int) -> bytes:
    """A smooth random image of side x side pixels, as PNG."""
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


class Side:
    """A system under test; `replica` is the part that answers, which can be started anew."""

    def __init__(self, model: Path, valkey: ValkeyServer, threads: int, folder: Path) -> None:
        self.model, self.valkey, self.threads, self.folder = model, valkey, threads, folder
        self.stack = ExitStack()
        self.names: dict[bytes, Any] = {}  # how an image that was seen is named
        self.http = httpx2.Client(timeout=600, trust_env=False, verify=False)
        self.url, self.served = "", "model"

    def start(self) -> None:
        """Everything, until it answers."""
        raise NotImplementedError

    def new_replica(self) -> float:
        """End the part that answers, start another; its seconds until it is ready."""
        raise NotImplementedError

    def pids(self) -> list[int]:
        """Of all processes that serve, the store's apart."""
        raise NotImplementedError

    def part(self, image: bytes) -> dict[str, Any]:
        """The message part for an image, in the way that costs this side least."""
        raise NotImplementedError

    def ask(self, image: bytes, text: str, part: dict[str, Any] | None = None) -> tuple[float, float, str]:
        """Seconds to the first token and to the last, and the answer; what the image itself costs counts."""
        began = time.perf_counter()
        content = [part or self.part(image), {"type": "text", "text": text}]
        body = {"model": self.served, "messages": [{"role": "user", "content": content}], "stream": True}
        body |= {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        first, said = 0.0, ""
        with self.http.stream("POST", f"{self.url}/v1/chat/completions", json=body) as reply:
            if reply.status_code != 200:
                raise RuntimeError(reply.read().decode())
            for line in reply.iter_lines():
                if not line.startswith("data: {"):
                    continue
                choices = json.loads(line.removeprefix("data: "))["choices"]
                piece = (choices[0]["delta"].get("content") or "") if choices else ""
                if piece and not first:
                    first = time.perf_counter() - began
                said += piece
        total = time.perf_counter() - began
        return first or total, total, said

    def ask_all(self, image: bytes, texts: Sequence[str]) -> float:
        """Seconds until all are answered, asked at once."""
        began = time.perf_counter()
        part = self.part(image)  # the same for all: a uuid alone means nothing yet to a server that is just told it
        with ThreadPoolExecutor(len(texts)) as pool:
            list(pool.map(lambda text: self.ask(image, text, part), texts))
        return time.perf_counter() - began

    def close(self) -> None:
        """End everything."""
        self.http.close()
        self.stack.close()


class Ours(Side):
    """Gateway, vision service, language service."""

    engine = "packed"

    def start(self) -> None:
        common = ("--model", str(self.model), "--store", self.valkey.url, "--device", "cpu", "--dtype", "float32")
        common += ("--threads", str(self.threads))
        how = {"env": {"OMP_NUM_THREADS": str(self.threads)}}
        self.vision = self.stack.enter_context(_closing(ServiceProcess("vision_service", *common, **how)))
        args = (*common, "--vision", self.vision.address, "--kv-bytes", KV, "--prefix-bytes", KV)
        args += ("--context-length", "4096", "--engine", self.engine)
        python = str(PYTHON) if self.engine == "vllm" else sys.executable
        self.language = self.stack.enter_context(_closing(ServiceProcess("lm_service", *args, python=python, **how)))
        for service in (self.vision, self.language):
            service.wait_ready(START_SECONDS)
        addresses = ("--vision", self.vision.address, "--lm", self.language.address)
        self.gateway = self.stack.enter_context(_closing(GatewayProcess(*addresses, "--store", self.valkey.url)))
        self.gateway.wait_ready()
        self.url = self.gateway.url
        self.served = self.http.get(f"{self.url}/v1/models").json()["data"][0]["id"]

    def new_replica(self) -> float:
        began = time.perf_counter()
        self.language.restart()
        while self.http.get(f"{self.url}/readyz").json()["status"] != "ready":
            time.sleep(0.05)
        return time.perf_counter() - began

    def pids(self) -> list[int]:
        return [self.vision.pid, self.language.pid, self.gateway.pid]

    def part(self, image: bytes) -> dict[str, Any]:
        if image not in self.names:
            reply = self.http.post(f"{self.url}/v1/images", files={"file": ("a.png", image)})
            self.names[image] = f"lookonce:{reply.json()['id']}"
        return {"type": "image_url", "image_url": {"url": self.names[image]}}

    def ask_all(self, image: bytes, texts: Sequence[str]) -> float:
        began = time.perf_counter()
        name = self.part(image)["image_url"]["url"].removeprefix("lookonce:")
        body = {"questions": list(texts), "max_tokens": TOKENS, "temperature": 0}
        self.http.post(f"{self.url}/v1/images/{name}/questions", json=body).raise_for_status()
        return time.perf_counter() - began


class OursOnVllm(Ours):
    """The same with vLLM behind our Protocol."""

    engine = "vllm"


class Vllm(Side):
    """A stock server, by its own OpenAI door."""

    arguments: tuple[str, ...] = ()

    def start(self) -> None:
        self._spawn()

    def _spawn(self) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", self.model]
        command += ["--served-model-name", "model", "--port", str(port), "--dtype", "float32", "--block-size", "32"]
        command += ["--max-model-len", "4096", "--enforce-eager", *self.arguments]
        own = environment() | {"OMP_NUM_THREADS": str(self.threads)}
        with (self.folder / "vllm.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, env=own, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )
        self.stack.callback(self._end)
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if self.http.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx2.TransportError:
                time.sleep(0.1)
        raise RuntimeError((self.folder / "vllm.log").read_text(errors="replace")[-3000:])

    def _end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def new_replica(self) -> float:
        self._end()
        self.names.clear()  # it remembers nothing
        began = time.perf_counter()
        self._spawn()
        return time.perf_counter() - began

    def pids(self) -> list[int]:
        return [self.process.pid]

    def part(self, image: bytes) -> dict[str, Any]:
        """With its pixels once, by its uuid from then on."""
        if image in self.names:
            return {"type": "image_url", "image_url": None, "uuid": self.names[image]}
        self.names[image] = f"image-{len(self.names)}"
        url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
        return {"type": "image_url", "image_url": {"url": url}, "uuid": self.names[image]}


class VllmOnStore(Vllm):
    """A stock server whose images come from our store: its tower is never built."""

    def start(self) -> None:
        from lookonce_vllm.filler import Filler

        common = ("--model", str(self.model), "--store", self.valkey.url, "--device", "cpu", "--dtype", "float32")
        how = {"env": {"OMP_NUM_THREADS": str(self.threads)}}
        vision = ServiceProcess("vision_service", *common, "--threads", str(self.threads), **how)
        self.vision = self.stack.enter_context(_closing(vision))
        config = json.dumps(transfer(self.valkey.url, vision=[self.vision.address]))
        limits = ("--mm-processor-cache-gb", "0", "--limit-mm-per-prompt", '{"image": 0, "video": 0}')
        self.arguments = (*limits, "--ec-transfer-config", config)
        self.vision.wait_ready()
        self._spawn()
        import asyncio

        self.loop = asyncio.new_event_loop()

        async def filler() -> Filler:
            return Filler(self.vision.address)

        self.filler = self.loop.run_until_complete(filler())
        self.stack.callback(lambda: self.loop.run_until_complete(self.filler.close()))

    def part(self, image: bytes) -> dict[str, Any]:
        if image not in self.names:
            self.names[image] = self.loop.run_until_complete(self.filler.part(image))
        found: dict[str, Any] = self.names[image]
        return found

    def pids(self) -> list[int]:
        return [self.process.pid, self.vision.pid]


KINDS = dict(zip(SIDES, (Ours, OursOnVllm, Vllm, VllmOnStore), strict=True))


@contextmanager
def _closing(process: Any) -> Iterator[Any]:
    try:
        yield process
    finally:
        process.close()


def measure(side: Side, pixels: int, rounds: int) -> tuple[dict[str, float], list[str]]:
    """Seconds and MiB of every scene, and the answers to the first questions."""
    found: dict[str, float] = {}
    began = time.perf_counter()
    side.start()
    found["start"] = time.perf_counter() - began
    side.ask(photograph(999, pixels), "Anything?")  # what is lazily made is made
    images = [photograph(number, pixels) for number in range(rounds)]
    firsts = [side.ask(image, "What is this?") for image in images]
    found["first question, first token"] = statistics.median(one[0] for one in firsts)
    found["first question, total"] = statistics.median(one[1] for one in firsts)
    warm = [side.ask(images[-1], f"Number {number}?") for number in range(2 * rounds)]
    found["warm question, first token"] = statistics.median(one[0] for one in warm)
    found["warm question, total"] = statistics.median(one[1] for one in warm)
    sixteen = [side.ask_all(images[-1], [f"At once {n} {r}?" for n in range(16)]) for r in range(rounds)]
    found["16 at once, warm"] = statistics.median(sixteen)
    many = [
        side.ask_all(photograph(100 + r, pixels), [f"Of many {n}?" for n in range(32)]) for r in range(min(rounds, 3))
    ]
    found["32 questions, new image"] = statistics.median(many)
    for number in range(8):
        side.ask(photograph(200 + number, pixels), "And this?")
    back = [side.ask(image, "Again?") for image in images]
    found["back to an earlier image, first token"] = statistics.median(one[0] for one in back)
    found["memory, MiB"] = sum(_pss(pid) for pid in side.pids()) / (1 << 20)
    found["new replica, start"] = side.new_replica()
    side.ask(photograph(998, pixels), "Anything?")
    anew = [side.ask(image, "And now?") for image in images]
    found["new replica, known image, first token"] = statistics.median(one[0] for one in anew)
    return found, [one[2] for one in firsts]


def _pss(pid: int) -> int:
    """Bytes of a process and all it has started, shared pages in proportion."""
    process = psutil.Process(pid)
    return sum(int(one.memory_full_info().pss) for one in (process, *process.children(recursive=True)))


def table(found: dict[str, dict[str, float]]) -> str:
    """A row for each scene, in milliseconds (start: seconds; memory: MiB)."""
    rows = ["| | " + " | ".join(found) + " |", "|---|" + "---|" * len(found)]
    for scene in next(iter(found.values())):
        unit, scale = ("", 1.0) if "MiB" in scene else (", s", 1.0) if "start" in scene else (", ms", 1000.0)
        numbers = [
            f"{scale * one[scene]:,.1f}" if scale == 1.0 else f"{scale * one[scene]:,.0f}" for one in found.values()
        ]
        rows.append(f"| {scene}{unit} | " + " | ".join(numbers) + " |")
    return "\n".join(rows)


def ratios(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """What we hold ourselves to."""
    results = {}
    if {"ours+vllm", "vllm"} <= found.keys():
        warm = "warm question, first token"
        results["warm first token, ours+vllm / vllm (at most 1.15)"] = found["ours+vllm"][warm] / found["vllm"][warm]
    anew = "new replica, known image, first token"
    for name in ("ours", "ours+vllm", "vllm+store"):
        if {name, "vllm"} <= found.keys():
            results[f"new replica's first token on a known image, {name} / vllm (at most 0.5)"] = (
                found[name][anew] / found["vllm"][anew]
            )
    return results


def main() -> int:
    """Print the table and the ratios."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen2-vl-50m", help=HELP)
    parser.add_argument("--side", type=int, default=672, help="pixels a side of the images")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES if PYTHON.is_file() else SIDES[:1]))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    answers: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = checkpoint_at(options.model, Path(folder))
        for name in options.sides:
            with ValkeyServer() as valkey, tempfile.TemporaryDirectory() as own:
                side = KINDS[name](model, valkey, options.threads, Path(own))
                try:
                    found[name], answers[name] = measure(side, options.side, options.rounds)
                finally:
                    side.close()
            print(f"{name}: " + ", ".join(f"{scene} {value:.3f}" for scene, value in found[name].items()), flush=True)
    reference = answers[options.sides[-1]]
    equal = {name: sum(a == b for a, b in zip(said, reference, strict=True)) for name, said in answers.items()}
    print(table(found))
    print(
        f"\nanswers equal to {options.sides[-1]}'s: "
        + ", ".join(f"{n} {c} of {len(reference)}" for n, c in equal.items())
    )
    for text, value in ratios(found).items():
        print(f"{value:.2f}  {text}")
    if options.json:
        options.json.write_text(json.dumps({"seconds": found, "ratios": ratios(found), "equal": equal}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
