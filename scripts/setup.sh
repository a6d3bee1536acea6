#!/usr/bin/env bash
# Create the virtual environment with the exact versions of constraints.txt. Called by `make setup`.
# On a machine without an NVIDIA GPU only a CPU build of torch is accepted, so no CUDA package is ever downloaded.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV="${VENV:-.venv}"
EXTRAS="${EXTRAS:-dev}"
PYTHON="${PYTHON:-python3}"
export PIP_DISABLE_PIP_VERSION_CHECK=1

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "setup: Python 3.11 or newer is needed; '$PYTHON' is $("$PYTHON" --version 2>&1). Set PYTHON=..." >&2
  exit 1
}
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
pip() { "$VENV/bin/python" -m pip "$@" 2> >(grep -v '^WARNING: Location' >&2); }

torch_version=$(sed -n 's/^torch==//p' constraints.txt)
if "$VENV/bin/python" -c "import importlib.metadata as m; v = m.version('torch'); raise SystemExit(v.split('+')[0] != '$torch_version')" 2>/dev/null; then
  :
elif command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then
  echo "setup: installing torch $torch_version (GPU found)"
  pip install --quiet "torch==$torch_version"
elif [ "$(uname -s)" != Linux ] || [ "$(uname -m)" != x86_64 ]; then
  echo "setup: installing torch $torch_version"
  pip install --quiet "torch==$torch_version"
else
  echo "setup: installing torch $torch_version, CPU build (no GPU found)"
  pip install --quiet ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch==$torch_version+cpu" || {
    echo "setup: pip knows no CPU build of torch $torch_version. Point TORCH_INDEX at PyTorch's index of CPU wheels" >&2
    echo "setup: (its address is on PyTorch's installation page, under 'CPU') and run again: make setup TORCH_INDEX=..." >&2
    exit 1
  }
fi
echo "setup: installing lookonce and its tools"
pip install --quiet -c constraints.txt hatchling editables
pip install --quiet -c constraints.txt --no-build-isolation -e ".[$EXTRAS]"
echo "setup: done ($VENV)"
