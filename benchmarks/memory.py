"""What each service holds and reads, at real Qwen2-VL-2B dimensions (or another family's), against the unsplit model.

A random-weight checkpoint (bfloat16; 4.4 GB, Qwen2.5-VL-3B 7.5 GB) is written once. Each subject then starts in a
fresh process, with the checkpoint's pages dropped from the page cache; its resident memory comes from
/proc/PID/smaps_rollup once it is ready, the bytes it read from /proc/PID/io. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.checkpoints import HELP, checkpoint_at
from lookonce.models.checkpoint import Half, open_checkpoint
from lookonce.models.sizing import DTYPE_BYTES

UNSPLIT = """
import sys, time, torch
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype=sys.argv[2])
for parameter in model.parameters():  # mapped until used: touch every page, as the first forward does
    parameter.data.view(-1)[::1024].sum()
print("ready", flush=True)
time.sleep(600)
"""
MIB = 1 << 20


def main() -> int:
    """Measure the three subjects and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2-vl-2b", help=HELP)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lookonce-memory-") as folder:
        os.environ.setdefault("LOOKONCE_CACHE_DIR", f"{folder}/cache")
        model = str(checkpoint_at(options.model, Path(folder), options.dtype, shards=2))
        checkpoint = open_checkpoint(
            model
        )  # computes the identity once, as `lookonce up` does before it starts the services
        stored = {half: checkpoint.weight_bytes(half) for half in (Half.VISION, Half.LANGUAGE)}
        width = DTYPE_BYTES[options.dtype] / DTYPE_BYTES[checkpoint.dtype]
        service = ["--model", model, "--dtype", options.dtype, "--listen", f"unix:{folder}/s.sock"]
        rows = {
            "unsplit model": (sum(stored.values()), [sys.executable, "-c", UNSPLIT, model, options.dtype]),
            "vision service": (stored[Half.VISION], [sys.executable, "-m", "vision_service", *service]),
            "language service": (stored[Half.LANGUAGE], [sys.executable, "-m", "lm_service", *service]),
        }
        figures = {}
        for name, (size, command) in rows.items():
            measure(command, model, folder)  # once to bring the libraries into the page cache
            figures[name] = {
                "weights_bytes": int(size * width),
                "stored_bytes": size,
                **measure(command, model, folder),
            }
    report(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))
    return 0


def measure(command: list[str], model: str, folder: str) -> dict[str, float]:
    """Start, wait until ready, read the kernel's accounts, stop."""
    drop_from_page_cache(model)
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            if "-c" in command:
                if not process.stdout or process.stdout.readline().strip() != "ready":
                    raise RuntimeError(f"{command[0]} did not get ready")
            else:
                wait_serving(f"unix:{folder}/s.sock", process)
            return {"seconds": time.monotonic() - started, **account(process.pid)}
        finally:
            process.kill()


def account(pid: int) -> dict[str, float]:
    """Resident bytes (all, and those not backed by a file) and bytes read from storage."""
    memory = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    io = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return {
        "resident_bytes": int(memory["Rss"].split()[0]) * 1024,
        "anonymous_bytes": int(memory["Anonymous"].split()[0]) * 1024,
        "read_bytes": int(io["read_bytes"]),
    }


def drop_from_page_cache(model: str) -> None:
    """So that what is read from the checkpoint is read from storage."""
    for path in Path(model).glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def wait_serving(address: str, process: subprocess.Popen[str]) -> None:
    """Return once the service's health check says SERVING."""
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while process.poll() is None:
            try:
                reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=2)
                if reply.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.RpcError:
                pass
            time.sleep(0.1)
    raise RuntimeError(f"the service ended with status {process.returncode}")


def report(figures: dict[str, dict[str, float]]) -> None:
    """Print the table."""
    whole = figures["unsplit model"]
    titles = f"{'weights':>10}{'resident':>10}{'read':>10}{'resident / unsplit':>20}{'read / stored':>16}{'start':>9}"
    print(f"{'':18}{titles}")
    for name, row in figures.items():
        print(
            f"{name:18}{row['weights_bytes'] / MIB:>6.0f} MiB{row['resident_bytes'] / MIB:>6.0f} MiB"
            f"{row['read_bytes'] / MIB:>6.0f} MiB{row['resident_bytes'] / whole['resident_bytes']:>20.2f}"
            f"{row['read_bytes'] / row['stored_bytes']:>16.3f}{row['seconds']:>7.1f} s"
        )
    vision = figures["vision service"]
    bound = 1.15 * vision["weights_bytes"] + 400 * MIB
    print(
        f"vision service resident against its bound (weights x1.15 + 400 MiB): {vision['resident_bytes'] / bound:.2f}"
    )


if __name__ == "__main__":
    sys.exit(main())
