"""`--engine vllm` on the command line: which interpreter, what is passed on, what doctor and plan say of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lookonce.cli import checks
from lookonce.cli.model import BUNDLED, Model
from lookonce.cli.rundir import DataDirectory
from lookonce.cli.system_plan import plan_system
from lookonce.cli.up import UpSettings
from lookonce.cli.vllm_environment import tensor_parallel_sizes, vllm_python
from lookonce.core.errors import LookonceError
from lookonce.core.settings import load
from lookonce.models.family import unserved_by_vllm
from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from lookonce.models.registry import BUILTIN, family_of
from tests.cli.commands import invoke

MODEL = Model(str(BUNDLED), None, "shapes", "x", 1)


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """A folder that looks like vLLM's environment."""
    folder = tmp_path / "venv"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/python").symlink_to(sys.executable)
    monkeypatch.setenv("VENV_VLLM", str(folder))
    return folder


def planned(tmp_path, flags, **variables):
    with DataDirectory(tmp_path / "data") as directory:
        system = plan_system(load(UpSettings, flags), set(flags), directory, MODEL, {**variables})
    return {service.name: service for service in system.services}


def test_the_language_service_runs_in_vllms_environment(tmp_path, environment):
    flags = {"engine": "vllm", "tensor_parallel": 2, "gpu_memory_share": 0.7, "engine_args": '{"enforce_eager": true}'}
    services = planned(tmp_path, flags, VENV_VLLM=str(environment))
    language = services["language"]
    assert language.python == str(environment / "bin/python") != services["vision"].python == sys.executable
    given = dict(zip(language.arguments[::2], language.arguments[1::2], strict=True))
    assert (given["--engine"], given["--tensor-parallel"], given["--gpu-memory-share"]) == ("vllm", "2", "0.7")
    assert given["--engine-args"] == '{"enforce_eager": true}' and "--pipeline-parallel" not in given
    assert "--engine" not in services["vision"].arguments


def test_the_services_own_variable_decides_too(tmp_path, environment):
    services = planned(tmp_path, {}, VENV_VLLM=str(environment), LOOKONCE_LM_ENGINE="vllm")
    assert services["language"].python == str(environment / "bin/python")
    assert "--engine" not in services["language"].arguments, "it reads its variable itself"
    assert planned(tmp_path, {}, LOOKONCE_LM_ENGINE="packed")["language"].python == sys.executable


def test_without_it_the_command_that_makes_it_is_told(tmp_path):
    for text in (
        invoke("up", "--engine", "vllm", "--port", 0, "--data-dir", tmp_path, VENV_VLLM=str(tmp_path / "none")),
        invoke("doctor", "--engine", "vllm", VENV_VLLM=str(tmp_path / "none")),
    ):
        assert text.returncode == 1
        assert "scripts/setup_vllm.sh" in text.stdout + text.stderr and "none/bin/python" in text.stdout + text.stderr
    with pytest.raises(LookonceError) as caught:
        vllm_python(Path("/nowhere/python"), {})
    assert caught.value.param == "vllm_python"


@pytest.mark.parametrize(
    ("heads", "kv_heads", "most", "sizes"),
    [(28, 4, 8, [1, 2, 4]), (12, 2, 8, [1, 2, 4, 6]), (64, 8, 16, [1, 2, 4, 8, 16]), (12, 2, 1, [1])],
)
def test_gpus_that_may_share_a_layer(heads, kv_heads, most, sizes):
    assert tensor_parallel_sizes(heads, kv_heads, most) == sizes


def told(monkeypatch, python, **versions):
    """What doctor says of an environment with these versions."""
    there = {"vllm": "0.32.0", "lookonce": True, "transformers": "5.19.0", "torch": "2.13.0+cpu"} | versions
    monkeypatch.setattr("lookonce.cli.vllm_environment.installed", lambda found: there)
    gpus = {"gpus": [{"free": 1, "total": 1, "capability": "9.0"}] * 2}
    return {one.check: one for one in checks.check_vllm(str(BUNDLED), None, gpus, python)}


def test_doctor_looks_at_the_environment_and_the_heads(monkeypatch, environment):
    python = environment / "bin/python"
    good = told(monkeypatch, python)
    assert good["vllm"].status == "ok" and "--tensor-parallel 1 or 2 on the 2 GPUs" in good["engine"].detail
    assert told(monkeypatch, python, vllm="0.31.1")["vllm"].status == "warn"
    assert told(monkeypatch, python, vllm=None)["vllm"].status == "fail"
    assert told(monkeypatch, python, lookonce=False)["vllm"].status == "fail"


def test_doctor_asks_a_real_interpreter(environment):
    findings = list(checks.check_vllm(str(BUNDLED), None, None, environment / "bin/python"))
    assert findings[0].status == "fail" and "lacks vLLM" in findings[0].detail, "this one has none"
    broken = environment / "bin/broken"
    broken.write_text("#!/bin/sh\necho no such library >&2\nexit 3\n")
    broken.chmod(0o755)
    assert next(checks.check_vllm(str(BUNDLED), None, None, broken)).status == "fail"


def test_plan_says_over_how_many_gpus_and_which_share(tmp_path):
    model = make_random_checkpoint(tmp_path / "tiny", size="tiny")
    done = invoke("plan", "--model", model, "--gpus", "24,24,24", "--engine", "vllm")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line[:1] in "1234" and "fits" in line]
    assert [row[0] for row in rows] == ["1", "2"]
    command = done.stdout.splitlines()[-1]
    assert command.startswith("lookonce up --model") and "--engine vllm --tensor-parallel 1" in command
    numbers = json.loads(invoke("plan", "--model", model, "--gpus", "24,24,24", "--engine", "vllm", "--json").stdout)
    assert [one["tensor_parallel"] for one in numbers] == [1, 2] and all(one["fits"] for one in numbers)
    assert 0 < numbers[0]["memory_share"] <= 0.9


def test_plan_says_when_nothing_fits(tmp_path):
    model = make_random_checkpoint(tmp_path / "tiny", size="tiny")
    small = invoke("plan", "--model", model, "--gpus", "0.5", "--engine", "vllm")
    assert small.returncode == 1 and "nothing fits" in small.stderr
    none = invoke("plan", "--model", model, "--ram", "8", "--engine", "vllm")
    assert none.returncode == 1 and "--gpus" in none.stderr


def test_the_families_are_those_of_the_documents():
    served = {name for name in BUILTIN if unserved_by_vllm(family_of({"model_type": name})) is None}
    assert served == {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"}
    text = (Path(__file__).resolve().parents[2] / "docs/engines.md").read_text()
    assert "Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3-VL of experts" in " ".join(text.split())
    assert "Toy is not served by vLLM here" in str(unserved_by_vllm(SimpleNamespace(label="Toy")))
