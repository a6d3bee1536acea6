"""Batch moderation against its floors: bare packed encodes and bare packed scores of the same images, in one process.

Each round draws new images. A floor is handed ready patches and prompts: it encodes all, then scores all rules of
each image; only the forwards count. There are three:
- "transformers, plain": its modules, called as directly as can be, eight images packed at once: of each what all its
  questions share, then their tails. In a process of its own (benchmarks.bare_moderation), which also holds its
  probabilities against our engine's.
- "transformers": the same, packed in the fastest of several ways, what only some questions begin with shared as well.
- "own kernels", the stricter one: our encoder in batches of eight, and our engine's forwards, eight images under way,
  packed as they come; so prefixes and beginnings of questions are shared, and kernels are compiled, as in the services.
  With two threads OpenMP lets the helpers of one process sleep between products once more than one of its threads
  computes (here: encodes and scores); "helpers awake" is the same with each stage's threads to themselves.
The job is `lookonce moderate` on real services, from files to a durable Parquet file. Floors and job take turns.
Where the rest of the job goes: CPU time of each process in a round, and what decoding, cutting patches and building
prompts cost.
Target: floor / job >= 0.9.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil
import torch
from PIL import Image

from benchmarks.engine import Timed
from lm_service.engine.packed.build import PackedBuilder
from lm_service.engine.packed.engine import PackedEngine
from lm_service.engine.packed.options import PackedOptions
from lm_service.engine.types import EmbeddingSource, ScoreItem, Scoring
from lm_service.prompt import Message, PromptBuilder, load_template
from lm_service.settings import LanguageSettings
from lookonce.core.identity import EmbeddingReference
from lookonce.core.process import keep_freed_memory
from lookonce.models.checkpoint import open_checkpoint
from lookonce.models.family import Patches
from lookonce.models.qwen2_vl.preprocessing import Preprocessor
from lookonce.models.qwen2_vl.vision import Encoder
from lookonce.moderation.policy import Policy, parse_policy
from tests.moderate.scenes import make_images, policy_text
from tests.processes import ServiceProcess

BUNDLED = Path(__file__).resolve().parent.parent / "lookonce/data/shapes"
PACK = 8  # images of one bare encode, and scored at once


class Rows:
    """An EmbeddingLoader over what the floor has just encoded."""

    def __init__(self) -> None:
        self.rows: dict[bytes, torch.Tensor] = {}

    async def load(self, reference: EmbeddingReference, rows_of: Any = None) -> tuple[torch.Tensor, EmbeddingSource]:
        """At once."""
        return self.rows[reference.key], EmbeddingSource.TENSOR_CACHE


class Preparation:
    """What happens to images and rules before either half of the model sees them; loads no weights."""

    def __init__(self, model: Path) -> None:
        self.checkpoint = open_checkpoint(str(model))
        self.bounds = (self.checkpoint.min_pixels, self.checkpoint.max_pixels)
        self.merge = self.checkpoint.merge_size
        self.preprocess = Preprocessor(self.checkpoint.preprocessor)
        self.builder = PromptBuilder(
            load_template(self.checkpoint.path, self.checkpoint.family),
            self.checkpoint.family,
            self.checkpoint.config,
            context_length=1 << 15,
            max_images=1,
            check_fingerprint=lambda reference: None,
        )

    def patches(self, data: bytes) -> Patches:
        """Decoded and cut."""
        return self.preprocess(Image.open(BytesIO(data)), *self.bounds)

    def items(self, policy: Policy, key: bytes, patches: Patches) -> tuple[ScoreItem, ...]:
        """The prompts of all rules."""
        tokens = patches.count // self.merge**2
        reference = EmbeddingReference(key, "0" * 64, key, patches.grid_thw, tokens, patches.width, patches.height)
        found = []
        for rule in policy.rules:
            choices = tuple(tuple(self.builder.template.text_ids(choice)) for choice in rule.choices)
            prompt = self.builder.build([Message("user", (reference, rule.ask("image")))])
            found.append(ScoreItem(prompt, choices))
        return tuple(found)


class Floor:
    """Both halves of the model in this process, by our own kernels."""

    def __init__(self, preparation: Preparation, dtype: torch.dtype) -> None:
        self.patches, self.items = preparation.patches, preparation.items
        self.encoder = Encoder.load(preparation.checkpoint, dtype, torch.device("cpu"))
        self.encoder.warm_up()
        name = "bfloat16" if dtype is torch.bfloat16 else "float32"
        checkpoint = preparation.checkpoint
        settings = LanguageSettings(model=str(checkpoint.path), dtype=name, device="cpu")
        adapter, _ = PackedBuilder(settings).load(checkpoint, 32768)
        self.timed = Timed(adapter)
        self.rows = Rows()
        self._table = preparation.builder.template.table
        self.engine = self.new_engine()

    def new_engine(self) -> PackedEngine:
        """Not started."""
        options = PackedOptions(kv_bytes=256 << 20, prefix_bytes=256 << 20)
        return PackedEngine(self.timed, self._table, frozenset(), options)

    async def run(self, policy: Policy, files: Sequence[bytes], number: int) -> dict[str, float]:
        """Seconds of each stage for all files."""
        began = time.perf_counter()
        cut = [self.patches(data) for data in files]
        prepared = time.perf_counter()
        keys = [(number * len(files) + place).to_bytes(32, "little") for place in range(len(files))]
        asked = [self.items(policy, key, patches) for key, patches in zip(keys, cut, strict=True)]
        built = time.perf_counter()
        self.encode(keys, cut)
        encoded = time.perf_counter()
        forwards = self.timed.seconds
        await self.score(self.engine, keys, asked)
        scored = time.perf_counter()
        return {
            "decode and cut": prepared - began,
            "build prompts": built - prepared,
            "bare encodes, own kernels": encoded - built,
            "bare scores, own kernels": self.timed.seconds - forwards,
            "scores with the engine's own work": scored - encoded,
        }

    async def run_awake(self, policy: Policy, files: Sequence[bytes]) -> dict[str, float]:
        """Seconds of the bare stages, each in a thread that ends with it: before anything else computes here."""
        cut = [self.patches(data) for data in files]
        keys = [place.to_bytes(32, "big") for place in range(len(files))]
        asked = [self.items(policy, key, patches) for key, patches in zip(keys, cut, strict=True)]

        def encode() -> float:
            self.encode(keys[:PACK], cut[:PACK])
            began = time.perf_counter()
            self.encode(keys, cut)
            return time.perf_counter() - began

        with ThreadPoolExecutor(1) as thread:
            encodes = await asyncio.get_running_loop().run_in_executor(thread, encode)
        engine = self.new_engine()
        await engine.start(self.rows)
        await self.score(engine, keys[:PACK], asked[:PACK], keep=True)
        forwards = self.timed.seconds
        await self.score(engine, keys[PACK:], asked[PACK:])
        scores = (self.timed.seconds - forwards) * len(files) / (len(files) - PACK)
        await engine.close()
        return {"bare encodes, own, helpers awake": encodes, "bare scores, own, helpers awake": scores}

    def encode(self, keys: Sequence[bytes], cut: Sequence[Patches]) -> None:
        """Packs of eight."""
        for start in range(0, len(cut), PACK):
            for key, rows in zip(keys[start:], self.encoder.encode(cut[start : start + PACK]), strict=False):
                self.rows.rows[key] = rows

    async def score(
        self,
        engine: PackedEngine,
        keys: Sequence[bytes],
        asked: Sequence[tuple[ScoreItem, ...]],
        *,
        keep: bool = False,
    ) -> None:
        """Eight images at once; unless `keep`, their embeddings are forgotten."""
        waiting = iter(zip(keys, asked, strict=True))

        async def worker() -> None:
            for key, items in waiting:
                await engine.score(Scoring(key.hex(), items))

        await asyncio.gather(*(worker() for _ in range(PACK)))
        if not keep:
            self.rows.rows.clear()


def transformers_floor(options: argparse.Namespace, images: Path, policy: Path) -> dict[str, float]:
    """Seconds of its stages. Raises RuntimeError when its probabilities are not ours."""
    command = [sys.executable, "-m", "benchmarks.bare_moderation", "--model", str(options.model)]
    command += ["--images", str(images), "--policy", str(policy)]
    command += ["--dtype", options.dtype, "--threads", str(options.threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"benchmarks.bare_moderation: status {done.returncode}: {done.stdout.decode()}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])["seconds"]
    return found


def processor_seconds(process: psutil.Process) -> float:
    """User and system, so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


def cpu_of(process: subprocess.Popen[bytes]) -> float:
    """Seconds of a child that may have ended."""
    return processor_seconds(psutil.Process(process.pid)) if process.poll() is None else 0.0


def job(folder: Path, images: Path, policy: Path, services: Sequence[ServiceProcess]) -> dict[str, float]:
    """Seconds of the command from its first image to its result, and CPU seconds of each process."""
    before = [processor_seconds(psutil.Process(service.pid)) for service in services]
    out = folder / "out.parquet"
    vision, language = services
    command = [sys.executable, "-m", "lookonce", "moderate", str(images), "--policy", str(policy), "--out", str(out)]
    command += ["--vision", vision.address, "--lm", language.address, "--log-level", "warning"]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        while not (folder / "out.parquet.run/ledger.sqlite3").exists() and process.poll() is None:
            time.sleep(0.005)
        began, imports = time.perf_counter(), cpu_of(process)
        while not out.exists() and process.poll() is None:
            time.sleep(0.005)
        ended = time.perf_counter()
        client = cpu_of(process)
        text = process.communicate()[0].decode()
    if process.returncode != 0:
        raise RuntimeError(text)
    out.unlink()
    after = [processor_seconds(psutil.Process(service.pid)) for service in services]
    return {
        "job": ended - began,
        "start of the command": began - started,
        "CPU vision service": after[0] - before[0],
        "CPU language service": after[1] - before[1],
        "CPU command": client - imports,
        "CPU start of the command": imports,
    }


async def measure(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Medians over the rounds."""
    torch.set_num_threads(options.threads)
    dtype = torch.bfloat16 if options.dtype == "bfloat16" else torch.float32
    with ThreadPoolExecutor(1) as thread:
        floor = thread.submit(Floor, Preparation(options.model), dtype).result()
    keep_freed_memory()  # as the services do
    policy = folder / "policy.yaml"
    policy.write_text(policy_text().replace(", follow_up: 'How many crosses are there?', follow_up_tokens: 12", ""))
    rules = parse_policy(policy.read_text())
    make_images(folder / "first", options.images, duplicates=0.0, broken=0.0)
    awake = await floor.run_awake(rules, [path.read_bytes() for path in sorted((folder / "first").rglob("*.png"))])
    await floor.engine.start(floor.rows)
    args = ("--model", str(options.model), "--dtype", options.dtype, "--store", f"file://{folder}/store")
    args = (*args, "--threads", str(options.service_threads), "--log-level", "warning")
    rounds: list[dict[str, float]] = []
    env = {"OMP_NUM_THREADS": str(options.service_threads)}
    with (
        ServiceProcess("vision_service", *args, env=env) as vision,
        ServiceProcess("lm_service", *args, "--vision", vision.address, env=env) as language,
    ):
        for number in range(options.rounds + 1):
            images = folder / f"images{number}"
            count = options.images if number else 16
            make_images(images, count + number, duplicates=0.0, broken=0.0)  # other seeds would be other sizes
            for path in images.rglob("*.png"):
                path.write_bytes(path.read_bytes() + number.to_bytes(4, "little"))  # new to the services
            files = [path.read_bytes() for path in sorted(images.rglob("*.png"))]
            found = await floor.run(rules, files, number)
            if number and options.transformers:  # the first warms up
                found |= transformers_floor(options, images, policy)
            found |= job(folder, images, policy, (vision, language))
            if number:
                rounds.append({name: value / len(files) for name, value in found.items()})
    await floor.engine.close()
    return summary(rounds, {name: value / options.images for name, value in awake.items()})


def summary(rounds: Sequence[dict[str, float]], awake: dict[str, float]) -> dict[str, float]:
    """Milliseconds an image, and ratios, from seconds an image."""
    figures = {name: 1000 * statistics.median(one[name] for one in rounds) for name in rounds[0]}
    for kind in (name.removeprefix("bare encodes, ") for name in rounds[0] if name.startswith("bare encodes, ")):
        floors = [one[f"bare encodes, {kind}"] + one[f"bare scores, {kind}"] for one in rounds]
        figures[f"floor, {kind}"] = 1000 * statistics.median(floors)
        ratios = [floor / one["job"] for floor, one in zip(floors, rounds, strict=True)]
        figures[f"floor, {kind} / job"] = statistics.median(ratios)
    figures |= {name: 1000 * value for name, value in awake.items()}
    figures["floor, own, helpers awake"] = 1000 * sum(awake.values())
    return figures | {"floor, own, helpers awake / job": figures["floor, own, helpers awake"] / figures["job"]}


def main() -> int:
    """Print a table: milliseconds an image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--images", type=int, default=300, help="a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the floor")
    parser.add_argument("--service-threads", type=int, default=1, help="of each service: the two share the cores")
    parser.add_argument(
        "--transformers",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="its floors as well: a dozen packings, minutes for larger models",
    )
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lookonce-bench-") as folder:
        figures: dict[str, Any] = asyncio.run(measure(options, Path(folder)))
    print(f"{'milliseconds an image':40}{'median':>10}")
    for name, value in figures.items():
        print(f"{name:40}{value:>10.2f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
