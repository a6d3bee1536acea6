"""Generate the gRPC stubs beside their .proto files, or (--check) compare the committed ones byte for byte."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "protos/lookonce/v1").glob("*.proto"))


def generate(out: Path) -> None:
    """Write all stubs below `out`. Exits with protoc's status when it fails."""
    outputs = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
    status = protoc.main(["protoc", f"-I{ROOT}", *outputs, *SOURCES])
    if status:
        sys.exit(status)


def differences(out: Path) -> list[str]:
    """Stubs that are missing, stale or left over."""
    fresh = {path.relative_to(out): path.read_bytes() for path in out.rglob("*_pb2*.py*")}
    kept = {path.relative_to(ROOT): path.read_bytes() for path in (ROOT / "protos").rglob("*_pb2*.py*")}
    kept = {path: data for path, data in kept.items() if "__pycache__" not in path.parts}
    return sorted(str(path) for path in fresh.keys() | kept.keys() if fresh.get(path) != kept.get(path))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail when a stub differs")
    if not parser.parse_args().check:
        generate(ROOT)
        return
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        stale = differences(Path(folder))
    if stale:
        sys.exit("stale stubs (run `make protos`): " + ", ".join(stale))
    print(f"protos-check: stubs of {len(SOURCES)} files are up to date")


if __name__ == "__main__":
    main()
