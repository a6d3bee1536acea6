"""Run every check; exit status 1 when anything is wrong."""

from __future__ import annotations

import sys
from pathlib import Path

from deploy.check import compose, docker, helm, metrics

CHECKS = (docker.check, compose.check, helm.check, metrics.check)


def main() -> int:
    """Print what is wrong, a line each."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[2]
    problems = [problem for check in CHECKS for problem in check(root)]
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"deploy: {len(problems)} problems" if problems else "deploy: every file holds")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
