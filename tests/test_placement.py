"""What `auto` means for the dtype of a half: one answer, whoever is asked."""

from __future__ import annotations

import pytest
import torch

from lm_service.app import load as load_language
from lm_service.settings import LanguageSettings
from lookonce.cli.capacity import GIB, Device, Workload, placements
from lookonce.cli.checks import check_checkpoint, check_cpu, check_cuda
from lookonce.models.checkpoint import Half, open_checkpoint
from lookonce.models.checkpoint.check import check_settings
from lookonce.models.devices import choose_dtype, dtype_name
from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from lookonce.models.sizing import size_of
from vision_service.app import load
from vision_service.settings import VisionSettings

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
STORED = ("float32", "bfloat16", "float16")


@pytest.mark.parametrize(
    ("name", "stored", "devices", "capability", "expected"),
    [
        ("auto", "bfloat16", [CUDA], (8, 0), torch.bfloat16),
        ("auto", "float16", [CUDA], (9, 0), torch.bfloat16),
        ("auto", "float32", [CUDA], (9, 0), torch.float32),  # what the weights hold is not rounded away unasked
        ("auto", "bfloat16", [CUDA], (7, 5), torch.float32),
        ("auto", "bfloat16", [CUDA, CPU], (8, 0), torch.float32),
        ("auto", "bfloat16", [CPU], None, torch.float32),
        ("bfloat16", "float32", [CPU], None, torch.bfloat16),
        ("float16", "float32", [CUDA], (8, 0), torch.float16),
    ],
)
def test_dtype(monkeypatch, name, stored, devices, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_dtype(name, devices, stored) is expected


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoints")
    return {stored: make_random_checkpoint(directory / stored, dtype=stored) for stored in STORED}


def planned(path, device):
    """By `lookonce plan`, which knows no more of a GPU than its memory."""
    found = placements(size_of(*check_settings(str(path), None)), [device], Workload(100, 100, 1), None)
    return {found[0].vision.dtype, found[0].language.dtype}


def diagnosed(path, report):
    """By `lookonce doctor`, for each half."""
    [finding, *_], _ = check_checkpoint(str(path), None, report)
    said = finding.detail.split("computes in ")[1:]
    assert len(said) == 2, finding.detail
    return {text.split(")")[0].split(";")[0] for text in said}


@pytest.mark.parametrize("stored", STORED)
def test_plan_doctor_and_both_services_agree_on_a_cpu(checkpoints, stored):
    path = checkpoints[stored]
    vision = load(VisionSettings(model=str(path), device="cpu"))
    language = load_language(LanguageSettings(model=str(path), device="cpu"))
    served = {dtype_name(vision.encoder.dtype), language.engine.describe().model.dtype}
    assert served == planned(path, Device("cpu", 64 * GIB)) == diagnosed(path, None) == {"float32"}


def test_nothing_about_the_cpu_changes_that(tmp_path):
    for flags in ("avx2", "avx2 avx512f avx512_bf16", "avx2 avx512f avx512_bf16 amx_bf16 amx_tile"):
        (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
        [finding] = check_cpu(tmp_path / "cpuinfo")
        assert "dtype auto is float32 on the CPU" in finding.detail


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)])
def test_plan_doctor_and_both_services_agree_on_a_gpu(monkeypatch, tmp_path, checkpoints, stored, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    path, name = checkpoints[stored], ".".join(map(str, capability))
    gpu = {"name": "GPU", "capability": name, "free": 64 * GIB, "total": 64 * GIB}
    report = {"version": "2", "threads": 1, "cuda": "12.8", "available": True, "gpus": [gpu]}
    opened = [open_checkpoint(str(path), needs=half) for half in (Half.VISION, Half.LANGUAGE)]
    served = {dtype_name(choose_dtype("auto", [CUDA], half.dtype)) for half in opened}
    assert served == diagnosed(path, report)
    [finding] = check_cuda(report, tmp_path)
    assert (served == {"bfloat16"}) is ("bfloat16" in finding.detail and stored != "float32")
    if capability >= (8, 0):
        assert served == planned(path, Device("cuda:0", 64 * GIB))


def test_doctor_counts_weights_as_they_are_computed_with(checkpoints):
    sizes = {stored: check_checkpoint(str(path), None, None)[1] for stored, path in checkpoints.items()}
    assert sizes["bfloat16"] == sizes["float16"] == sizes["float32"]
