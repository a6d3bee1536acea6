"""Run the benchmarks one after the other, each in its own process, and keep their results as JSON."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

MODULES = {
    "store_get": "store get of 4 MiB: embedded and Redis against a raw socket",
    "encode": "encode throughput through gRPC against the bare packed forward",
    "engine": "many questions over one image against the floor of bare forwards",
    "moderate": "batch moderation through the services against two floors: transformers bare, own kernels bare",
    "gateway": "warm question through the whole system against the engine alone",
    "files_passed": "files of ours that a warm question passes, by process",
    "hostile": "stalls of the gateway and its memory under hostile and large bodies",
    "pressure": "500 clients that hang up at once, and a language service that is full",
    "products": "our compiled matrix products against oneDNN's and torch's",
    "int8": "int8 weights against plain ones at 2B dimensions: products of one block and one layer",
    "memory": "resident memory and bytes read of each service at 2B dimensions (writes 4.4 GB; minutes)",
}
RESULTS = Path(__file__).resolve().parent / "results"


def main() -> int:
    """Run what was asked for; the number of benchmarks that failed is the status."""
    listing = "\n".join(f"  {name:10} {text}" for name, text in MODULES.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog=f"benchmarks:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", default=[], help="which (default: all)")
    names = parser.parse_args().names or list(MODULES)
    unknown = sorted(set(names) - set(MODULES))
    if unknown:
        parser.error(f"unknown benchmark {', '.join(unknown)}; known: {', '.join(MODULES)}")
    RESULTS.mkdir(exist_ok=True)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}\n")
    failed = 0
    for name in names:
        print(f"== {name}: {MODULES[name]}", flush=True)
        started = time.monotonic()
        command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(RESULTS / f"{name}.json")]
        status = subprocess.run(command, check=False).returncode
        failed += status != 0
        print(f"-- {name}: {'ok' if status == 0 else f'failed ({status})'} in {time.monotonic() - started:.0f} s\n")
    return failed


if __name__ == "__main__":
    sys.exit(main())
