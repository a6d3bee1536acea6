#!/usr/bin/env bash
# Create the virtual environment with the exact versions of constraints.txt, or bring it up to date. Called by make.
# EXTRAS: extras of pyproject.toml to install besides ("dev"); none: what `lookonce demo` and `lookonce up` need.
#
# Where no NVIDIA GPU is found, torch comes from the first place that has it:
#   the index of TORCH_INDEX, where one is given; what pip knows (its indexes, its folders of wheels);
#   PyTorch's own index of CPU wheels; PyPI's plain torch, with gigabytes of CUDA libraries that nothing here uses.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV="${VENV:-.venv}"
EXTRAS="${EXTRAS:-}"
PYTHON="${PYTHON:-python3}"
GIVEN_INDEX="${TORCH_INDEX:-}"
TORCH_INDEX="${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}"
PATIENCE=(--timeout 15 --retries 1) # of an index that may be out of reach
HEARTBEAT=15 # seconds of silence after which a line says what is going on
LOG="$VENV/setup.log"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1

say() { printf 'setup: %4d s  %s\n' "$SECONDS" "$*"; }

# pip's lines come in; what goes out is progress: downloads of a megabyte or more, installing, and signs of life.
progress() {
  local line doing="asking package indexes" status
  while :; do
    status=0
    IFS= read -r -t "$HEARTBEAT" line || status=$?
    if [ "$status" -gt 128 ]; then say "    still $doing"; continue; fi
    [ "$status" -eq 0 ] || return 0
    case "$line" in
      *Downloading*MB*) line="${line#*Downloading }"; line="${line##*/}"; doing="downloading $line"; say "    $doing" ;;
      "Installing collected packages:"*) set -- ${line#*:}; doing="installing $# packages"; say "    $doing" ;;
    esac
  done
}

pip() { "$VENV/bin/python" -m pip install --progress-bar off -c constraints.txt "$@" 2>&1 | tee "$LOG" | progress; }

need() {
  pip "$@" || {
    tail -n 30 "$LOG" >&2
    say "failed: pip's words are above, and whole in $LOG" >&2
    exit 1
  }
}

have_torch() {
  "$VENV/bin/python" -c "import importlib.metadata as m; raise SystemExit(m.version('torch').split('+')[0] != '$1')" 2>/dev/null
}

cpu_torch() { # VERSION PLACE [PIP OPTION...]: whether PLACE has it
  say "torch $1, CPU build, from $2"
  pip --no-deps "torch==$1+cpu" "${@:3}" && return
  if grep -qi 'connection broken\|timed out' "$LOG"; then say "    it can't be reached"; else say "    it has none"; fi
  return 1
}

install_torch() {
  local version="$1"
  if have_torch "$version"; then return; fi
  if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then
    say "torch $version, for the GPU found"
  elif [ "$(uname -s)" != Linux ]; then
    say "torch $version"
  else
    if [ -n "$GIVEN_INDEX" ]; then
      cpu_torch "$version" "$TORCH_INDEX" "${PATIENCE[@]}" --index-url "$TORCH_INDEX" && return
    fi
    cpu_torch "$version" "what pip knows" && return
    if [ -z "$GIVEN_INDEX" ]; then
      cpu_torch "$version" "$TORCH_INDEX" "${PATIENCE[@]}" --index-url "$TORCH_INDEX" && return
    fi
    say "torch $version from PyPI: large (2.7 GB to download, 5 GB on disk), for it brings CUDA's libraries"
    say "    to spare them, stop this and give TORCH_INDEX=URL, an index that has torch==$version+cpu"
  fi
  need "torch==$version"
}

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "setup: Python 3.11 or newer is needed; '$PYTHON' is $("$PYTHON" --version 2>&1). Set PYTHON=..." >&2
  exit 1
}
if [ ! -x "$VENV/bin/python" ]; then
  say "a virtual environment in $VENV"
  "$PYTHON" -m venv "$VENV"
fi
install_torch "$(sed -n 's/^torch==//p' constraints.txt)"
say "lookonce and what it needs${EXTRAS:+, with the extras $EXTRAS}"
need hatchling editables
need --no-build-isolation -e ".${EXTRAS:+[$EXTRAS]}"
say "done: $VENV, $(du -sm "$VENV" | cut -f1) MB"
