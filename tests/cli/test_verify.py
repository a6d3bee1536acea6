"""`lookonce verify`: what it passes, what it finds, and what it can't compare."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lookonce.cli import unsplit, verify_command
from lookonce.cli.split_answers import Item
from lookonce.cli.verify_command import CHOICES, _compared
from lookonce.models.checkpoint import recorded
from lookonce.models.checkpoint.split import split_checkpoint
from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from lookonce.models.qwen3_vl.synthetic import make_random_checkpoint as make_deepstack_checkpoint
from lookonce.models.registry import Half
from lookonce.models.tolerance import BOUNDS, INT8_BOUND, bound_of, difference
from tests.checkpoint.loras import adapter
from tests.cli.commands import invoke, lookonce


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_random_checkpoint(tmp_path_factory.mktemp("verify") / "model")


def result_of(done):
    found = json.loads(done.stdout)
    return {check["name"]: check for check in found["checks"]}, found


def test_help_teaches():
    shown = " ".join(invoke("verify", "--help").stdout.split())
    for word in (
        "--image",
        "--question",
        "--halves",
        "--record",
        "--dtype",
        "--json",
        "Exit status 1",
        "greedy tokens",
    ):
        assert word in shown


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--dtype", "int3"], 2, "--dtype='int3': use float32, bfloat16 or float16"),
        (["--dtype", "bfloat16", "--record"], 2, "--record is made in float32"),
        (["--quantization", "int8", "--record"], 2, "--record is made in float32"),
        (["--quantization", "int4"], 2, "--quantization='int4': use none or int8"),
        (["--adapter", "lora", "--record"], 2, "--record is made of a checkpoint without an adapter"),
        (["--adapter", "/no/such/lora"], 1, "/no/such/lora: no such directory, and not a hub id"),
        (["--image", "/no/such.png"], 1, "--image=/no/such.png: there is no such file"),
    ],
)
def test_what_can_not_be_is_said_at_once(checkpoint, arguments, code, said):
    done = invoke("verify", checkpoint, *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr


def test_halves_are_no_whole_checkpoint(checkpoint, tmp_path):
    split_checkpoint(str(checkpoint), tmp_path / "halves")
    done = invoke("verify", tmp_path / "halves")
    assert done.returncode == 1
    assert "is split: give the whole checkpoint, and this directory as --halves" in done.stderr


def test_without_transformers_there_is_a_sentence(checkpoint, monkeypatch):
    monkeypatch.setattr(verify_command.importlib.util, "find_spec", lambda name: None)
    done = invoke("verify", checkpoint)
    assert done.returncode == 1
    assert "compares with transformers, which is not installed here" in done.stderr


def test_a_class_that_transformers_lacks_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "toy_vl"}))
    with pytest.raises(verify_command.LookonceError, match="no class for model_type 'toy_vl': nothing to compare with"):
        verify_command._unsplit({"model": str(tmp_path)})


def answered(directory, *, row=0.0, token=0.0, greedy=0.0, score=0.0):
    """One question: what the split model said, and what the unsplit one did, apart by these."""
    item = Item(directory / "image.png", "?", CHOICES[:2], [5], [[5, 6]], [[-0.5, -1.0]], [-1.0, -2.0])
    rows = {item.image: np.array([[1.0, -8.0]], dtype=np.float32)}
    np.array([[1.0 + row, -8.0]], dtype=np.float32).tofile(directory / "0.f32")
    answer = {
        "best": [5], "best_logprobs": [-0.5 + greedy], "token_logprobs": [-0.5],
        "top": [[-0.5, -1.0 + token]], "scores": [-1.0, -2.0 + score],
    }  # fmt: skip
    return {check.name: check for check in _compared(directory, [item], rows, [answer], "float32")}


@pytest.mark.parametrize(
    ("apart", "fails"),
    [
        ({}, set()),
        ({"row": 0.001}, set()),  # rows up to 8: an eighth of that
        ({"row": 0.01}, {"rows of the vision tower"}),
        ({"token": 3e-4}, {"log-probabilities of tokens"}),
        ({"greedy": 3e-4}, {"greedy tokens"}),
        ({"score": -3e-4}, {"scores of choices"}),
        ({"score": float("nan")}, {"scores of choices"}),
    ],
)
def test_each_check_has_its_bound(tmp_path, apart, fails):
    assert {name for name, check in answered(tmp_path, **apart).items() if not check.passed} == fails


def test_each_level_of_a_deepstack_is_compared(tmp_path):
    """By itself: numbers near zero are not hidden by larger ones of another level."""
    item = Item(tmp_path / "image.png", "?", (), [], [], [], [])
    rows = {item.image: np.array([[[100.0, 5.0]], [[0.5, 0.25]]], dtype=np.float32)}
    answer = {"token_logprobs": [], "best_logprobs": [], "top": [], "scores": [], "sample": []}
    for apart, passed in ((1e-4, True), (1e-3, False)):
        (rows[item.image] + np.array([[[0.0]], [[apart]]], dtype=np.float32)).tofile(tmp_path / "0.f32")
        checks = {check.name: check for check in _compared(tmp_path, [item], rows, [answer], "float32")}
        assert checks["rows of the vision tower"].passed and checks["rows of the deepstack"].passed == passed
        assert checks["rows of the deepstack"].compared == 2


@pytest.fixture(scope="module")
def with_adapter(tmp_path_factory):
    """A checkpoint with a deepstack, and an adapter that changes both halves."""
    folder = tmp_path_factory.mktemp("lora")
    modules = {
        "model.language_model.layers.1.self_attn.q_proj": (128, 64),
        "model.language_model.layers.0.mlp.down_proj": (64, 128),
        "model.visual.blocks.1.attn.qkv": (192, 64),
        "model.visual.deepstack_merger_list.0.linear_fc2": (64, 256),
    }
    return make_deepstack_checkpoint(folder / "model"), adapter(folder / "lora", modules)


def test_an_adapter_is_merged_into_the_unsplit_model(with_adapter):
    path, lora = with_adapter
    job = {"model": str(path), "dtype": "float32", "device": "cpu", "threads": 1}
    plain, merged = (dict(unsplit.Unsplit(each).model.named_parameters()) for each in (job, job | {"adapter": lora}))
    changed = {name for name, weight in merged.items() if not torch.equal(weight, plain[name])}
    pairs = load_file(lora / "adapter_model.safetensors")
    assert changed == {
        name.removeprefix("base_model.model.").replace("lora_A.", "") for name in pairs if "lora_A" in name
    }
    for name in changed:
        a, b = (pairs[f"base_model.model.{name.replace('.weight', f'.lora_{which}.weight')}"] for which in "AB")
        torch.testing.assert_close(merged[name], plain[name] + 6 / 4 * b @ a, atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--quantization", "int8")], ids=str)
def test_an_adapter_passes(with_adapter, options):
    """And int8, within its own bound: what is compared are both models with the adapter."""
    path, lora = with_adapter
    done = lookonce("verify", path, "--adapter", lora, *options, "--json")
    assert done.returncode == 0, done.stderr
    checks, found = result_of(done)
    assert found["passed"] and len(checks) == 5 and checks["rows of the deepstack"]["compared"]
    exact = max(check["difference"] for check in checks.values()) < 2e-4
    assert exact == (not options)


def test_one_table_of_bounds():
    assert difference([1.0], [1.0, 2.0]) == float("inf")
    assert difference([-19.0], [-20.0]) == pytest.approx(0.05)
    assert [bound_of(dtype) for dtype in BOUNDS] == [2e-4, 0.05, 0.25]
    assert bound_of("float32", "int8") == INT8_BOUND


@pytest.mark.slow
def test_the_bundled_model_passes():
    done = lookonce("verify", "--json")
    assert done.returncode == 0, done.stderr
    checks, found = result_of(done)
    assert found["passed"] and found["class"] == "Qwen2VLForConditionalGeneration"
    assert len(checks) == 4 and all(check["compared"] and check["passed"] for check in checks.values())


@pytest.mark.slow
def test_halves_pass_are_recorded_and_fail_once_falsified(checkpoint, tmp_path):
    """By verify, and with a record by the service itself."""
    halves = tmp_path / "halves"
    split_checkpoint(str(checkpoint), halves)
    done = lookonce("verify", checkpoint, "--halves", halves, "--record", "--json")
    assert done.returncode == 0, done.stderr
    assert result_of(done)[1]["passed"]
    records = {half: halves / half.value / recorded.FILES[half] for half in Half}
    assert all(file.is_file() for file in records.values())

    config = halves / "language" / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"rope_theta": 5000.0}))
    done = lookonce("verify", checkpoint, "--halves", halves)
    assert done.returncode != 0
    assert "self-check of the language half failed" in done.stderr  # it does not even start

    records[Half.LANGUAGE].unlink()
    done = lookonce("verify", checkpoint, "--halves", halves, "--json")
    assert done.returncode == 1, done.stderr
    checks, _ = result_of(done)
    assert checks["rows of the vision tower"]["passed"]
    assert not checks["log-probabilities of tokens"]["passed"] and not checks["scores of choices"]["passed"]
    shutil.rmtree(halves)
