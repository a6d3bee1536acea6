"""split, doctor, and the errors of ask and up that need no running service."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys

import httpx2
import pytest

from lookonce.cli.checks import check_cuda, check_memory
from lookonce.cli.model import resolve_model
from lookonce.core.errors import CheckpointError
from lookonce.models.checkpoint import Half, open_checkpoint
from lookonce.models.checkpoint.split import split_checkpoint
from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from tests.checkpoint.quantisers import gptq, quantised
from tests.checkpoint.towers import GPTQ
from tests.cli.commands import Up, environment, invoke, lookonce
from tests.images import photograph
from tests.processes import ROOT
from tests.system.cluster import encoded
from tests.unsplit import Unsplit

QUIET = {"LOOKONCE_DATA_DIR": "/nonexistent/lookonce"}


def test_split_writes_both_halves(checkpoint, tmp_path):
    done = lookonce("split", checkpoint, tmp_path / "halves")
    assert done.returncode == 0, done.stderr
    for half in Half:
        opened = open_checkpoint(str(tmp_path / "halves"), needs=half)
        assert opened.identity == open_checkpoint(str(checkpoint)).identity
        assert opened.identity in done.stdout and str(tmp_path / "halves" / half) in done.stdout


def test_split_refuses_to_overwrite_unless_forced(checkpoint, tmp_path):
    out = tmp_path / "halves"
    assert invoke("split", checkpoint, out).returncode == 0
    refused = invoke("split", checkpoint, out)
    assert refused.returncode == 1
    assert "--force" in refused.stderr
    assert invoke("split", checkpoint, out, "--force").returncode == 0


def test_split_of_nothing(tmp_path):
    done = invoke("split", tmp_path / "none", tmp_path / "out")
    assert done.returncode == 1
    assert "no such directory" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def findings(done) -> dict[str, dict]:
    return {finding["check"]: finding for finding in json.loads(done.stdout)}


def test_doctor_on_a_good_machine(checkpoint, tmp_path):
    done = lookonce("doctor", "--model", checkpoint, "--data-dir", tmp_path / "data", "--port", "0", "--json")
    found = findings(done)
    assert done.returncode == 0, done.stdout
    assert {"python", "torch", "cpu", "cuda", "checkpoint", "images", "memory", "data dir", "store", "port"} == set(
        found
    )
    assert found["checkpoint"]["status"] == found["python"]["status"] == found["torch"]["status"] == "ok"
    assert "vision" in found["memory"]["detail"] and "language" in found["memory"]["detail"]
    assert not (tmp_path / "data").exists(), "doctor changes nothing"


def test_doctor_names_what_is_wrong_and_the_remedy(tmp_path):
    whole = make_random_checkpoint(tmp_path / "whole", size="tiny")
    other = make_random_checkpoint(tmp_path / "other", size="tiny", seed=1)
    mixed = tmp_path / "mixed"
    assert invoke("split", whole, mixed).returncode == 0
    assert invoke("split", other, tmp_path / "others").returncode == 0
    shutil.rmtree(mixed / "language")
    shutil.copytree(tmp_path / "others" / "language", mixed / "language")
    weights = whole / "model.safetensors"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = lookonce(
            "doctor", "--model", mixed, "--store", "redis://:sesame@127.0.0.1:1", "--port", port, "--json",
            "--data-dir", weights / "data",
        )  # fmt: skip
    assert done.returncode == 1
    found = findings(done)
    assert "different checkpoints" in found["checkpoint"]["detail"]
    assert found["store"]["status"] == "fail" and "sesame" not in done.stdout
    assert found["port"]["status"] == "fail" and "--port" in found["port"]["remedy"]
    assert found["data dir"]["status"] == "fail"
    assert all(finding["remedy"] for finding in found.values() if finding["status"] != "ok")


@pytest.fixture
def mixed(tmp_path):
    """The vision half of a checkpoint beside the language half of another one that shares it, quantised."""
    whole = make_random_checkpoint(tmp_path / "whole", hidden=128, ffn=320)
    made = quantised(whole, tmp_path / "made", gptq(), GPTQ) / "quantised"
    split_checkpoint(str(whole), tmp_path / "halves")
    split_checkpoint(str(made), tmp_path / "quantised halves")
    shutil.rmtree(tmp_path / "halves" / "language")
    shutil.move(tmp_path / "quantised halves" / "language", tmp_path / "halves" / "language")
    return tmp_path / "halves"


def test_halves_of_two_checkpoints_that_share_a_vision_half_are_one_model(mixed):
    model = resolve_model(str(mixed))
    assert model.identity == open_checkpoint(str(mixed / "language")).identity
    assert model.identity != open_checkpoint(str(mixed / "vision")).identity
    settings = json.loads((mixed / "language" / "preprocessor_config.json").read_text()) | {"image_mean": [0.1] * 3}
    (mixed / "language" / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="that don't share a vision half: preprocessor differs"):
        resolve_model(str(mixed))


@pytest.mark.slow
def test_up_serves_halves_of_two_checkpoints(mixed, tmp_path):
    with Up(tmp_path / "data", "--model", mixed, "--port", "0", "--dtype", "float32") as both:
        both.wait_for("lookonce is ready")
        file = {"file": ("image", encoded(cat := photograph("chelsea", (96, 64))))}
        image = httpx2.post(f"{both.system.url}/v1/images", files=file, timeout=60).json()
        asked = {"questions": ["What is it?"], "temperature": 0, "max_tokens": 6}
        reply = httpx2.post(f"{both.system.url}/v1/images/{image['id']}/questions", json=asked, timeout=60)
    plain = Unsplit(tmp_path / "made" / "plain")
    assert reply.json()["answers"][0]["text"] == plain.answer([("user", [cat, "What is it?"])], 6)


def checkpoint_finding(model: object) -> dict[str, str]:
    """From a process of its own: looking for a hub id there sets the hub library offline for good."""
    code = "import json, sys; from lookonce.cli.checks import check_checkpoint as check\n"
    code += "print(json.dumps(vars(check(sys.argv[1], None)[0][0])))"
    command = [sys.executable, "-c", code, str(model)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_doctor_sees_a_damaged_checkpoint(tmp_path):
    damaged = make_random_checkpoint(tmp_path / "damaged", size="tiny")
    weights = damaged / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1000)
    finding = checkpoint_finding(damaged)
    assert finding["status"] == "fail" and "model.safetensors" in finding["detail"]


def test_doctor_does_not_fetch_a_hub_id():
    finding = checkpoint_finding("nobody/nothing")
    assert finding["status"] == "warn" and "will download it" in finding["remedy"]


GPU_TORCH = {"version": "2.9", "threads": 1, "cuda": "13.0", "available": False, "gpus": []}


def test_doctor_tells_a_driver_and_a_torch_that_do_not_match(tmp_path):
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Wed Oct 27\n")
    [finding] = check_cuda(GPU_TORCH, driver)
    assert finding.status == "fail" and "470.82.01" in finding.detail and "13.0" in finding.detail
    [finding] = check_cuda({**GPU_TORCH, "cuda": None}, driver)
    assert finding.status == "warn" and "built for the CPU" in finding.detail
    [finding] = check_cuda(GPU_TORCH, tmp_path / "none")
    assert finding.status == "ok"


def test_doctor_compares_memory_with_the_need_of_each_service():
    gpu = {"name": "GPU", "capability": "8.0", "free": 10 << 30, "total": 16 << 30}
    report = {**GPU_TORCH, "available": True, "gpus": [gpu]}
    [small] = check_memory({"vision": 1 << 30, "language": 4 << 30}, report)
    [both] = check_memory({"vision": 5 << 30, "language": 5 << 30}, report)
    [big] = check_memory({"vision": 1 << 30, "language": 14 << 30}, report)
    assert [small.status, both.status, big.status] == ["ok", "fail", "fail"]
    assert "together" in both.remedy and "smaller model" in big.remedy


@pytest.mark.parametrize(
    ("content", "said"), [(None, "No such file"), (b"", "is empty"), (b"no image at all", "is not an image")]
)
def test_ask_refuses_what_is_no_image(tmp_path, content, said):
    image = tmp_path / "image.jpg"
    if content is not None:
        image.write_bytes(content)
    done = invoke("ask", image, "-q", "What is it?", **QUIET)
    assert done.returncode == 1
    assert said in done.stderr and str(image) in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no question: give one with -q"),
        (["-q", "?", "--choices", "yes"], "--choices='yes'"),
        (["-q", "?", "--choices", "yes,yes"], "--choices='yes,yes'"),
        (["-q", "?", "--url", "http://127.0.0.1:1"], "cannot reach http://127.0.0.1:1"),
        (["-q", "?", "--url", "nonsense"], "is not a URL"),
    ],
)
def test_ask_errors(image_path, arguments, said):
    done = invoke("ask", image_path, *arguments, **QUIET)
    assert done.returncode == 1
    assert said in done.stderr and "Traceback" not in done.stderr


def test_up_with_a_port_in_use(checkpoint, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = invoke("up", "--model", checkpoint, "--data-dir", tmp_path, "--port", port)
    assert done.returncode == 1
    assert f"port {port} on 127.0.0.1 is in use" in done.stderr and "--port" in done.stderr


def test_up_with_a_bad_model(tmp_path):
    done = invoke("up", "--model", tmp_path / "nothing", "--data-dir", tmp_path / "data", "--port", "0")
    assert done.returncode == 1
    assert f"{tmp_path / 'nothing'}: no such directory" in done.stderr
    (tmp_path / "empty").mkdir()
    done = invoke("up", "--model", tmp_path / "empty", "--data-dir", tmp_path / "data", "--port", "0")
    assert done.returncode == 1
    assert "has no config.json" in done.stderr
    assert "starting" not in done.stderr


def test_up_with_an_unusable_data_dir(checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    done = invoke("up", "--model", checkpoint, "--data-dir", tmp_path / "file" / "data", "--port", "0")
    assert done.returncode == 1
    assert "--data-dir=" in done.stderr and "Traceback" not in done.stderr


def test_up_refuses_variables_that_would_move_its_private_doors(checkpoint, tmp_path):
    done = invoke(
        "up", "--model", checkpoint, "--data-dir", tmp_path, "--port", "0", LOOKONCE_VISION_TLS_KEY="/etc/key.pem"
    )
    assert done.returncode == 1
    assert "LOOKONCE_VISION_TLS_KEY" in done.stderr


@pytest.mark.parametrize(
    ("flags", "env", "said"),
    [
        (
            ["--host", "0.0.0.0"],
            {},
            "the gateway service can't start: --host 0.0.0.0 is reachable from outside: "
            "set LOOKONCE_GATEWAY_API_KEYS or --api-keys-file first",
        ),
        pytest.param(
            ["--vision-device", "warp"],
            {},
            "the vision service can't start: device 'warp' is not one of auto, cpu, cuda, cuda:N, mps",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [],
            {"LOOKONCE_GATEWAY_TLS_CERTIFICATE": "/nowhere/c.pem", "LOOKONCE_GATEWAY_TLS_KEY": "/nowhere/k.pem"},
            "the gateway service can't start: TLS: /nowhere/k.pem cannot be read (No such file or directory)",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_up_ends_at_once_and_says_last_why_a_service_cannot_start(checkpoint, tmp_path, flags, env, said):
    done = lookonce("up", "--model", checkpoint, "--data-dir", tmp_path, "--port", "0", *flags, **env)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"lookonce: error: {said}"
    assert done.stderr.count("starting (process") == 3, "nothing was tried again"


def test_ask_leaves_the_last_word_to_the_system_it_started(checkpoint, image_path, tmp_path):
    env = {"LOOKONCE_DATA_DIR": str(tmp_path), "LOOKONCE_GATEWAY_POLICY": "/nowhere/policy.yaml"}
    done = lookonce("ask", image_path, "-q", "What is it?", "--model", checkpoint, **env)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("lookonce: error: the gateway service can't start: the policy file")
