"""Command-line tools of the development environment, and pinned images."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

_PINNED = re.compile(r"[a-z0-9./_-]+(:[0-9]+/[a-z0-9./_-]+)?:v?[0-9][A-Za-z0-9._-]*(@sha256:[0-9a-f]{64})?")


def run(tool: str, *arguments: object, root: Path) -> subprocess.CompletedProcess[str]:
    """A tool that lies beside this interpreter, run from the repository's root."""
    command = [str(Path(sys.executable).parent / tool), *map(str, arguments)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


def is_shut(command: Sequence[str]) -> bool:
    """Whether this starts a Valkey that may admit its own container alone: its protected mode is not said to be off."""
    return "valkey-server" in command and ("--protected-mode", "no") not in pairwise(command)


def is_pinned(image: str) -> bool:
    """Whether an image's name has a version as its tag."""
    return _PINNED.fullmatch(image) is not None
