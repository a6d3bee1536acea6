"""The check for GPUs runs whole on a CPU, at tiny sizes; and says so when a stage fails or is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import LIMITS, STAGES

ROOT = Path(__file__).resolve().parent.parent


def check(out: Path, *stages: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DEVICE": "cpu", "SIZE": "tiny", "OUT": str(out), "PYTHON": sys.executable}
    command = [ROOT / "scripts/gpu_check.sh", *stages]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_all_stages_run_on_a_cpu(tmp_path: Path) -> None:
    done = check(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(LIMITS) == set(STAGES)
    for stage in STAGES:
        found = json.loads((tmp_path / f"{stage}.json").read_text())
        assert not found["faults"] and f"ok    {stage}" in done.stdout
        assert found["figures"] or stage == "faults"


@pytest.mark.slow
def test_a_fault_or_a_missing_stage_fails_the_check(tmp_path: Path) -> None:
    for stage in STAGES:
        faults = ["attention is off by 3"] if stage == "kernels" else []
        text = {"figures": {"step, ms": 1.5}, "faults": faults, "seconds": 1.0, "device": "cpu"}
        (tmp_path / f"{stage}.json").write_text(json.dumps(text))
    command = [sys.executable, "-m", "benchmarks.gpu", "summary", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "attention is off by 3" in done.stdout and "step, ms: 1.5" in done.stdout
    (tmp_path / "kernels.json").write_text((tmp_path / "parity.json").read_text())
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    (tmp_path / "audit.json").unlink()
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 1
