"""`lookonce plan`: true figures for the published sizes, from their configs; placements that fit; usable commands."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys

import pytest
import torch

from lookonce.checkpoint import lean
from lookonce.cli.placing import Choice, Device, Workload, placements
from lookonce.cli.up import UpSettings
from lookonce.families import Half, family_of
from lookonce.sizing import Economics, question_flops, size_of
from tests.cli import published
from tests.cli.commands import environment, invoke
from tests.processes import ROOT

TOTALS = {"2B": (665_271_296, 2_208_985_600), "7B": (675_759_104, 8_291_375_616), "72B": (699_356_672, 73_405_560_320)}
GIB = 1 << 30


def size(name):
    config = published.config(name)
    family = family_of(config)
    return size_of(family, config, family.preprocessor({"min_pixels": 3136, "max_pixels": 12845056}))


@pytest.mark.parametrize("name", TOTALS)
def test_parameters_are_those_of_the_modules_and_of_the_published_totals(name):
    config = published.config(name)
    family = family_of(config)
    counted = size(name).halves
    text = family.text_config(config)
    with torch.device("meta"):
        tower = lean.VisionTower(family.vision_config(config))
        model = lean.TextModel(text)
    head = 0 if family.tied_head(config) else text["vocab_size"] * text["hidden_size"]
    built = sum(parameter.numel() for parameter in model.parameters()) + head
    assert counted[Half.VISION].parameters == sum(parameter.numel() for parameter in tower.parameters())
    assert counted[Half.LANGUAGE].parameters == built
    assert (counted[Half.VISION].parameters, sum(half.parameters for half in counted.values())) == TOTALS[name]


@pytest.mark.parametrize(("name", "record", "kv"), [("2B", 4.0, 37.4), ("7B", 9.4, 74.9), ("72B", 21.4, 427.8)])
def test_an_image_of_1024_pixels_a_side(name, record, kv):
    sized = size(name)
    tokens = sized.image_tokens(1024, 1024)
    assert tokens == 1369
    assert round(sized.embedding_bytes(tokens, "bfloat16") / 2**20, 1) == record
    assert round(sized.kv_bytes(tokens, "bfloat16") / 2**20, 1) == kv


@pytest.mark.parametrize(
    ("name", "questions", "embeddings", "prefixes"),
    [("2B", 10, 3.1, 9.5), ("7B", 10, 1.5, 8.9), ("2B", 100, 4.0, 64.8), ("7B", 100, 1.6, 43.0)],
)
def test_economics(name, questions, embeddings, prefixes):
    sized = size(name)
    work = Economics.of(sized, 1369, 30, questions)
    assert round(work.unsplit / work.embeddings, 1) == embeddings
    assert round(work.unsplit / work.prefixes, 1) == prefixes
    # With nothing kept, a question costs what an unsplit model's does; hits can only make it cheaper.
    cold = question_flops(sized, 1369, 30, prefix_hits=0, embedding_hits=0)
    assert cold == pytest.approx(Economics.of(sized, 1369, 30, 1).unsplit, rel=0.01)
    warm = question_flops(sized, 1369, 30, prefix_hits=1, embedding_hits=0)
    assert warm == sized.prefill_flops(30, 1369) < cold / 20


def test_placements_respect_each_device():
    sized, work = size("7B"), Workload(1369, 130, 32)
    best, *others = placements(sized, [Device("cuda:0", 24 * GIB), Device("cuda:1", 80 * GIB)], work, None)
    assert (best.vision.device.name, best.language.device.name) == ("cuda:0", "cuda:1")
    assert best.language == Choice(best.language.device, "bfloat16", False)
    assert best.language_need.weights == 7_615_616_512 * 2
    for item in (best, *others):
        together = item.vision.device is item.language.device
        used = item.language_need.total + item.vision_need.total * together
        assert item.fits == (
            used <= item.language.device.usable and item.vision_need.total <= item.vision.device.usable
        )
    # Two GPUs of 12 GiB hold the halves of neither 7B; the CPU holds the language half.
    small = [Device("cuda:0", 12 * GIB), Device("cpu", 64 * GIB)]
    best = placements(sized, small, work, None)[0]
    assert best.fits and best.language.device.is_cpu and best.language.dtype == "float32"
    assert not placements(sized, [Device("cuda:0", 12 * GIB)], work, None)[0].fits


def test_int8_is_offered_only_where_nothing_else_fits():
    sized, work = size("72B"), Workload(1369, 130, 8)
    best = placements(sized, [Device("cuda:0", 24 * GIB), Device("cuda:1", 96 * GIB)], work, None)[0]
    assert best.fits and best.language.int8 and best.language.device.name == "cuda:1" and not best.vision.int8
    # Each matrix one byte a weight and four a row; embedding, head, norms and biases as they were.
    language = sized.halves[Half.LANGUAGE]
    plain = language.parameters - language.matrix_parameters
    assert best.language_need.weights == 2 * plain + language.matrix_parameters + 4 * language.matrix_rows
    both = placements(size("7B"), [Device("cuda:0", 24 * GIB), Device("cuda:1", 96 * GIB)], work, None)
    assert not any(item.language.int8 for item in both if item.fits and item.language.device.name == "cuda:1")


def test_the_command_prints_all_and_its_commands_are_right(tmp_path):
    model = published.write(tmp_path / "Qwen2-VL-7B-Instruct", "7B")
    done = invoke("plan", "--model", model, "--gpus", "24,80", "--store", "redis://cache:6379")
    assert done.returncode == 0, done.stderr
    for said in ("7,615,616,512 parameters", "1.3 GiB", "74.9 MiB", "9.1 GiB", "1369 tokens", "8.9 x"):
        assert said in done.stdout, said
    line = next(line for line in done.stdout.splitlines() if line.startswith("lookonce up"))
    flags = shlex.split(line)[2:]
    values = {
        name.removeprefix("--").replace("-", "_"): value for name, value in zip(flags[::2], flags[1::2], strict=True)
    }
    settings = UpSettings(**values)
    assert (settings.vision_device, settings.lm_device) == ("cuda:0", "cuda:1")
    room = (settings.lm_kv_bytes or 0) + (settings.lm_prefix_bytes or 0)
    assert 50 * GIB < room < 60 * GIB
    for module in ("vision_service", "lm_service", "gateway"):
        command = next(line for line in done.stdout.splitlines() if line.startswith(f"python -m {module}"))
        for flag in re.findall(r"--([a-z0-9-]+)", command):
            assert f"--{flag}" in (ROOT / "docs/settings.md").read_text(), flag


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--gpus", "24,lots"), "--gpus must be GiB"),
        ((), "give --gpus, --ram or both"),
        (("--gpus", "24", "--image", "big"), "--image must be WIDTHxHEIGHT"),
        (("--gpus", "24", "--dtype", "int3"), "--dtype must be one of"),
        (("--gpus", "1"), "nothing fits"),
    ],
)
def test_what_cannot_be_planned_is_said(tmp_path, arguments, said):
    done = invoke("plan", "--model", published.write(tmp_path / "m", "2B"), *arguments)
    assert done.returncode == 1
    assert said in done.stderr and "Traceback" not in done.stderr


def test_json_for_programs(tmp_path):
    done = invoke("plan", "--model", published.write(tmp_path / "m", "2B"), "--gpus", "24", "--json")
    (only,) = json.loads(done.stdout)
    assert only["fits"] and only["vision_need"]["weights"] == 2 * 665_271_296


def test_planning_imports_no_torch(tmp_path):
    model = published.write(tmp_path / "m", "2B")
    code = (
        "import sys\nfrom lookonce.cli import main\n"
        f"sys.argv = ['lookonce', 'plan', '--model', {str(model)!r}, '--gpus', '24']\n"
        "try: main()\nexcept SystemExit as end: assert not end.code\n"
        "print('HEAVY', sorted({'torch', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert "HEAVY []" in done.stdout, done.stderr
