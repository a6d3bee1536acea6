#!/usr/bin/env bash
# Runs tests with the interpreter of vLLM's environment: those of engines are then vLLM's. Usage: scripts/test_in_vllm.sh FILES
set -euo pipefail
cd "$(dirname "$0")/.."
export LOOKONCE_TEST_ENGINE=vllm PYTHONPATH="${PYTHONPATH:-.}" OMP_NUM_THREADS=1
# One event loop for all: vLLM's processes are started once. Its imports warn of much.
exec "${VENV_VLLM:-.venv-vllm}/bin/python" -m pytest -q -p no:cacheprovider -W default \
  -o asyncio_default_fixture_loop_scope=session -o asyncio_default_test_loop_scope=session "$@"
