"""Tests that run in vLLM's environment (`make test-vllm`), where they import it."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("vllm") is not None else ["test_*.py"]
