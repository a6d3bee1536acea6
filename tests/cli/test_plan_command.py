"""`lookonce plan`: true figures for the published sizes, from their configs; placements that fit; usable commands."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from lm_service.engine.packed.options import PackedOptions
from lm_service.settings import LanguageSettings
from lookonce.cli import capacity
from lookonce.cli.capacity import Choice, Device, Workload, placements
from lookonce.cli.up import UpSettings
from lookonce.core.layer_split import layers_of, parse
from lookonce.models import devices
from lookonce.models.qwen2_vl import modules
from lookonce.models.registry import Half, family_of
from lookonce.models.sizing import Economics, question_flops, size_of
from tests.cli import published
from tests.cli.commands import environment, invoke
from tests.processes import ROOT
from vision_service import core as vision
from vision_service.settings import VisionSettings

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
        tower = modules.VisionTower(family.vision_config(config))
        model = modules.TextModel(text)
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


def test_several_gpus_where_no_single_one_will_do():
    sized, work = size("72B"), Workload(1369, 130, 8)
    gpus = [Device(f"cuda:{index}", 80 * GIB) for index in range(3)]
    best, *others = placements(sized, gpus, work, None)
    assert best.fits and best.language.devices == tuple(gpus) and not best.language.int8
    assert sum(best.language.layers) == 80
    shown = best.language.where.split(",")
    assert shown[0].startswith("cuda:0=0-") and shown[2].endswith("-79")
    # Nothing is over on any device, by the formulas of docs/operations.md.
    table = 2 * 152_064 * 8192
    for at, (device, layers) in enumerate(zip(best.language.devices, best.language.layers, strict=True)):
        used = layers * (sized.layer_bytes("bfloat16") + best.kv_bytes // 80)
        used += best.language_need.working + best.language_need.runtime + table * (at != 1)
        used += best.vision_need.total * (device is best.vision.device)
        assert used <= device.usable
    assert sized.layer_bytes("bfloat16") == pytest.approx(2 * 877_684_736, rel=1e-6)
    # One GPU is better than several, wherever it will do.
    assert not any(item.language.further for item in placements(size("7B"), gpus, work, None))
    assert not any(item.language.int8 for item in (best, *others))
    (tight, *_) = placements(sized, [Device(f"cuda:{index}", 24 * GIB) for index in range(4)], work, None)
    assert tight.fits and tight.language.int8 and len(tight.language.devices) == 4
    (tiny, *_) = placements(sized, [Device(f"cuda:{index}", 12 * GIB) for index in range(4)], work, None)
    assert not tiny.fits and tiny.spare < 0


def test_what_a_family_cannot_be_served_as_is_not_offered():
    sized, work = size("72B"), Workload(1369, 130, 8)

    def offered(sized, count, room):
        gpus = [Device(f"cuda:{index}", room * GIB) for index in range(count)]
        return {(item.language.int8, bool(item.language.further)) for item in placements(sized, gpus, work, None)}

    assert (True, False) in offered(sized, 1, 96) and (False, True) in offered(sized, 3, 80)
    plain = replace(sized, dimensions=replace(sized.dimensions, int8=False))
    assert offered(plain, 1, 96) == {(False, False)} and (False, True) in offered(plain, 3, 80)
    recurrent = replace(sized, dimensions=replace(sized.dimensions, state_floats=1))
    assert offered(recurrent, 3, 80) == {(False, False)}


def test_the_commands_of_a_spread_placement(tmp_path):
    done = invoke("plan", "--model", published.write(tmp_path / "m", "72B"), "--gpus", "80,80,80")
    lines = done.stdout.splitlines()
    (up,) = [line for line in lines if line.startswith("lookonce up")]
    flags = shlex.split(up)[2:]
    given = {name[2:].replace("-", "_"): value for name, value in zip(flags[::2], flags[1::2], strict=True)}
    settings = UpSettings(**given)
    assert settings.lm_device is None and settings.vision_device in ("cuda:0", "cuda:1", "cuda:2")
    shares = parse(settings.lm_device_map)
    assert [share.device for share in shares] == ["cuda:0", "cuda:1", "cuda:2"]
    assert layers_of(settings.lm_device_map, shares, 80) == [share.layers for share in shares]
    (alone,) = [line for line in lines if line.startswith("python -m lm_service")]
    assert f"--device-map {settings.lm_device_map} " in alone and "--device " not in alone


def test_what_plan_takes_for_granted_are_the_services_defaults():
    assert VisionSettings.model_fields["batch_patches"].default is None
    assert vision.BATCH_PATCHES == capacity.BATCH_PATCHES
    assert LanguageSettings.model_fields["tensor_cache_bytes"].default == capacity.TENSOR_CACHE_BYTES
    assert LanguageSettings.model_fields["max_running"].default == capacity.MAX_RUNNING
    assert PackedOptions().burst_tokens == capacity.BURST_TOKENS


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16", None])
def test_auto_is_what_the_services_make_of_it(monkeypatch, stored):
    """On a GPU of today, and on a CPU."""
    config = published.config("2B") | {"torch_dtype": stored}
    family = family_of(config)
    sized = size_of(family, config, family.preprocessor({}))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    for item in placements(sized, [Device("cuda:0", 80 * GIB), Device("cpu", 80 * GIB)], Workload(1369, 130, 8), None):
        for choice in (item.vision, item.language):
            expected = devices.choose_dtype("auto", [torch.device(choice.device.name)], stored or "bfloat16")
            assert choice.dtype == devices.dtype_name(expected)


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
