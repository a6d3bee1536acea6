"""Encode throughput through gRPC at concurrency 8 against the bare packed forward on the same images.

Both run in alternating rounds of one run, so that whatever else the machine does falls on both; medians are compared.
The service is a real process that decodes files and keeps embeddings in memory; the floor is handed ready patches and
encodes them in batches of eight, and does nothing else. Every round sends images the service has not seen.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.checkpoints import HELP, checkpoint_at
from lookonce.core.rpc.client import VisionClient
from lookonce.models.checkpoint import Half, open_checkpoint
from lookonce.models.family import Patches, VisionEncoder
from protos.lookonce.v1 import vision_pb2
from tests.processes import ServiceProcess

CONCURRENCY = 8


def photographs(count: int, side: int, seed: int) -> list[bytes]:
    """JPEG files of smooth random images, about as large as photographs of this size."""
    random = np.random.default_rng(seed)
    files = []
    for _ in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
        buffer = BytesIO()
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def bare(encoder: VisionEncoder, patches: list[Patches]) -> float:
    """Seconds of the forwards alone, in batches of CONCURRENCY."""
    started = time.perf_counter()
    for start in range(0, len(patches), CONCURRENCY):
        encoder.encode(patches[start : start + CONCURRENCY])
    return time.perf_counter() - started


async def through_grpc(client: VisionClient, files: list[bytes]) -> float:
    """Seconds with CONCURRENCY requests under way at any time."""
    waiting = iter(files)

    async def worker() -> None:
        for data in waiting:
            result = await client.encode(vision_pb2.EncodeRequest(image=data), timeout=600)
            if result.outcome != "miss":
                raise RuntimeError("an image was not new")

    started = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(CONCURRENCY)))
    return time.perf_counter() - started


async def measure(
    model: str, images: int, side: int, rounds: int, threads: int, device: str, dtype: str
) -> dict[str, float | str | int]:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as directory:
        path = checkpoint_at(model, Path(directory))
        checkpoint = open_checkpoint(str(path), needs=Half.VISION)
        encoder = checkpoint.family.load_encoder(checkpoint, getattr(torch, dtype), torch.device(device))
        encoder.warm_up()
        args = ("--model", str(path), "--dtype", dtype, "--device", device, "--threads", str(threads))
        floors, times = [], []
        with ServiceProcess("vision_service", *args, env={"OMP_NUM_THREADS": str(threads)}) as service:
            client = VisionClient(service.address)
            for number in range(rounds + 1):
                files = photographs(images, side, seed=number)
                patches = [
                    encoder.prepare(Image.open(BytesIO(data)), checkpoint.min_pixels, checkpoint.max_pixels)
                    for data in files
                ]
                floor, seconds = bare(encoder, patches), await through_grpc(client, files)
                if number:  # the first round warms both up
                    floors.append(floor)
                    times.append(seconds)
            await client.close()
    floor, seconds = statistics.median(floors), statistics.median(times)
    return {
        "model": model,
        "images": images,
        "patches": patches[0].count,
        "bare_images_per_second": images / floor,
        "grpc_images_per_second": images / seconds,
        "ratio": floor / seconds,
    }


def main() -> int:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.encode", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["qwen2-vl-tiny", "qwen2-vl-50m"], help=HELP)
    parser.add_argument("--images", type=int, default=16, help="images a round")
    parser.add_argument("--side", type=int, default=448, help="pixels a side")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--json", type=Path, nargs="?", const=Path("-"), help="write JSON here (- or nothing: stdout)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [
        asyncio.run(
            measure(model, options.images, options.side, options.rounds, options.threads, options.device, options.dtype)
        )
        for model in options.models
    ]
    text = json.dumps(rows, indent=2)
    if options.json == Path("-"):
        print(text)
        return 0
    if options.json:
        options.json.write_text(text + "\n")
    print(f"{'model':>16} {'patches':>8} {'bare images/s':>14} {'gRPC images/s':>14} {'ratio':>6}")
    for row in rows:
        print(
            f"{row['model']:>16} {row['patches']:>8} {row['bare_images_per_second']:>14.2f} "
            f"{row['grpc_images_per_second']:>14.2f} {row['ratio']:>6.2f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
