#!/usr/bin/env bash
# Proves on a machine with a GPU what can be proven only there, in ten minutes; the figures lie in benchmarks/results/gpu.
#   scripts/gpu_check.sh                          all stages at 2B
#   SIZE=7b scripts/gpu_check.sh decode encode    some stages, larger
#   DEVICE=cpu SIZE=tiny scripts/gpu_check.sh     the stages themselves, without a GPU
# Where pip reaches no index: WHEELS=folder, which scripts/gpu_wheels.sh has filled on another machine.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-.venv/bin/python}"
[ -x "$PYTHON" ] || PYTHON=python3
DEVICE="${DEVICE:-cuda}" SIZE="${SIZE:-2b}" OUT="${OUT:-benchmarks/results/gpu}"
if [ -n "${WHEELS:-}" ]; then
  "$PYTHON" -m pip install --quiet --no-index --find-links "$WHEELS" -r "$WHEELS/requirements.txt" || exit 1
fi
export PYTHONPATH="${PYTHONPATH:-.}" PYTHONUNBUFFERED=1
mkdir -p "$OUT"
"$PYTHON" -m benchmarks.gpu limits | while read -r stage seconds; do
  if [ $# -gt 0 ] && [[ " $* " != *" $stage "* ]]; then continue; fi
  rm -f "$OUT/$stage.json"
  echo "== $stage (at most $seconds s)"
  timeout --kill-after=10 "$seconds" "$PYTHON" -m benchmarks.gpu "$stage" --device "$DEVICE" --size "$SIZE" --out "$OUT" \
    > "$OUT/$stage.log" 2>&1 || tail -3 "$OUT/$stage.log"
done
"$PYTHON" -m benchmarks.gpu summary --out "$OUT"
