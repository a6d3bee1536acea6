"""What the check at start finds: one planted fault of each kind keeps either service from serving."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import structlog
import torch

from lm_service.app import load as load_language
from lm_service.settings import LanguageSettings
from lookonce.cli import unsplit
from lookonce.core.errors import CheckpointError
from lookonce.models import plain, self_check
from lookonce.models.checkpoint import open_checkpoint, recorded, weights
from lookonce.models.checkpoint.split import split_checkpoint
from lookonce.models.qwen2_5_vl import vision as window_vision
from lookonce.models.qwen2_5_vl.synthetic import make_random_checkpoint as make_window_checkpoint
from lookonce.models.qwen2_vl import modules, text, vision
from lookonce.models.qwen2_vl.preprocessing import Preprocessor
from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from lookonce.models.qwen3_vl.synthetic import make_random_checkpoint as make_deepstack_checkpoint
from lookonce.models.registry import Half
from lookonce.models.self_check import SelfCheckFailed, check_exam, check_image, plain_scores
from lookonce.models.tolerance import difference
from tests.checkpoint.loras import adapter
from tests.modules import load_language_model, load_vision_tower
from tests.processes import ServiceProcess
from vision_service.app import load as load_vision
from vision_service.settings import VisionSettings


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_random_checkpoint(tmp_path_factory.mktemp("check") / "model", tied=False)


@pytest.fixture(scope="module")
def window_checkpoint(tmp_path_factory):
    return make_window_checkpoint(tmp_path_factory.mktemp("check") / "windows")


@pytest.fixture(scope="module")
def deepstack_checkpoint(tmp_path_factory):
    return make_deepstack_checkpoint(tmp_path_factory.mktemp("check") / "deepstack")


def vision_of(path, **settings):
    return load_vision(VisionSettings(model=str(path), **settings)).encoder


def language_of(path, **settings):
    return load_language(LanguageSettings(model=str(path), **settings)).engine


def swap(module, first, second):
    """Two weights of one module, each in the other's place."""
    one, other = module.get_parameter(first), module.get_parameter(second)
    one.data, other.data = other.data, one.data


def loading(monkeypatch, owner, name, spoil):
    """What `owner` loads by a function of that name is spoiled before it is packed."""
    load = getattr(owner, name)

    def spoilt(*args, **named):
        loaded = load(*args, **named)
        spoil(loaded)
        return loaded

    monkeypatch.setattr(owner, name, staticmethod(spoilt) if isinstance(owner, type) else spoilt)


def weights_of_two_blocks(monkeypatch):
    loading(
        monkeypatch,
        vision.Encoder,
        "load_tower",
        lambda t: swap(t, "blocks.0.mlp.fc1.weight", "blocks.1.mlp.fc1.weight"),
    )


def rows_for_columns(monkeypatch):
    place = vision.patch_positions
    monkeypatch.setattr(vision, "patch_positions", lambda *grid: place(*grid).flip(1))


def pixels_a_little_too_bright(monkeypatch):
    begin = Preprocessor.__init__

    def spoilt(self, settings):
        begin(self, settings)
        self.table = (self.table * np.float32(1.005)).astype(np.float32)

    monkeypatch.setattr(Preprocessor, "__init__", spoilt)


def heads_of_the_tower_permuted(monkeypatch):
    def spoil(tower):
        weight = tower.blocks[0].attn.proj.weight
        weight.data = weight.data.view(len(weight), tower.blocks[0].attn.num_heads, -1).flip(1).reshape(weight.shape)

    loading(monkeypatch, vision.Encoder, "load_tower", spoil)


@pytest.mark.parametrize(
    "fault", [weights_of_two_blocks, rows_for_columns, pixels_a_little_too_bright, heads_of_the_tower_permuted]
)
def test_a_fault_of_the_tower_is_found(checkpoint, monkeypatch, fault):
    fault(monkeypatch)
    with pytest.raises(SelfCheckFailed, match=r"vision half failed: the rows .* bound in float32 is 0.0002.*--kernels"):
        vision_of(checkpoint)
    assert vision_of(checkpoint, self_check="off") is not None


def test_a_window_too_large_is_found(window_checkpoint, monkeypatch):
    """The image is 2 x 3 tokens; the checkpoint's windows are made smaller than that here, and ours are not."""
    settings = json.loads((window_checkpoint / "config.json").read_text())
    settings["vision_config"]["window_size"] = 28
    (window_checkpoint / "config.json").write_text(json.dumps(settings))
    vision_of(window_checkpoint)
    windows = window_vision.windows_of
    monkeypatch.setattr(window_vision, "windows_of", lambda rows, columns, side: windows(rows, columns, 4))
    with pytest.raises(SelfCheckFailed, match="vision half failed"):
        vision_of(window_checkpoint)


def weights_of_two_layers(monkeypatch):
    loading(
        monkeypatch,
        modules,
        "load_language_model",
        lambda loaded: swap(loaded[0], "layers.0.self_attn.k_proj.bias", "layers.1.self_attn.k_proj.bias"),
    )


def another_rope(monkeypatch):
    rope = modules.frequencies
    monkeypatch.setattr(modules, "frequencies", lambda text, width, theta: rope({"rope_theta": 5e5}, width, theta))


def rope_sections_in_another_order(monkeypatch):
    begin = modules.Rotary.__init__

    def spoilt(self, config):
        begin(self, config)
        self.mrope_section = self.mrope_section[::-1]

    monkeypatch.setattr(modules.Rotary, "__init__", spoilt)


def angles_scaled(monkeypatch):
    rotary = text.Qwen2VLAdapter._rotary
    monkeypatch.setattr(
        text.Qwen2VLAdapter, "_rotary", lambda self, positions: tuple(1.01 * x for x in rotary(self, positions))
    )


def heads_permuted(monkeypatch):
    def spoil(loaded):
        weight = loaded[0].layers[1].self_attn.o_proj.weight
        weight.data = weight.data.view(len(weight), 4, -1).roll(1, 1).reshape(weight.shape).contiguous()

    loading(monkeypatch, modules, "load_language_model", spoil)


def tokens_of_the_head_permuted(monkeypatch):
    def spoil(loaded):
        loaded[1].weight.data = loaded[1].weight.data.roll(1, 0)

    loading(monkeypatch, modules, "load_language_model", spoil)


@pytest.mark.parametrize(
    "fault",
    [
        weights_of_two_layers,
        another_rope,
        rope_sections_in_another_order,
        angles_scaled,
        heads_permuted,
        tokens_of_the_head_permuted,
    ],
)
@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_a_fault_of_the_language_half_is_found(checkpoint, monkeypatch, fault, kernels):
    fault(monkeypatch)
    with pytest.raises(SelfCheckFailed, match=r"language half failed: log-probabilities .* differ from its plain form"):
        language_of(checkpoint, kernels=kernels)


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_is_found_where_nothing_is_wrong(
    checkpoint, window_checkpoint, deepstack_checkpoint, dtype, quantization
):
    with structlog.testing.capture_logs() as logs:
        for path in (checkpoint, window_checkpoint, deepstack_checkpoint):
            vision_of(path, dtype=dtype, quantization=quantization)
            language_of(path, dtype=dtype, quantization=quantization)
    passed = [line for line in logs if line["event"] == "self-check passed"]
    assert [line["half"] for line in passed] == ["vision", "language"] * 3
    assert all(float(line["difference"]) < line["bound"] / 2 for line in passed)


def test_nothing_is_read_again(checkpoint, deepstack_checkpoint, monkeypatch):
    """What is expected is computed of the weights that are loaded anyway."""
    monkeypatch.setattr(plain, "read_weight", None)
    for path in (checkpoint, deepstack_checkpoint):
        for dtype in ("float32", "bfloat16"):
            vision_of(path, dtype=dtype)
            language_of(path, dtype=dtype)


def another_tensors_values(monkeypatch, name, other):
    read = weights._read_tensor

    def spoilt(descriptor, entry, *rest):
        offset = other.offset if entry.stored_name == name else entry.offset
        return read(descriptor, replace(entry, offset=offset), *rest)

    monkeypatch.setattr(weights, "_read_tensor", spoilt)


def wrongly_cast(monkeypatch, name, other):
    read = weights._read_tensor

    def spoilt(descriptor, entry, dtype, device):
        tensor = read(descriptor, entry, dtype, device)
        return tensor.bfloat16().to(dtype) if entry.stored_name == name else tensor

    monkeypatch.setattr(weights, "_read_tensor", spoilt)


@pytest.mark.parametrize("fault", [another_tensors_values, wrongly_cast])
@pytest.mark.parametrize(
    ("half", "pair"),
    [
        (Half.VISION, ("visual.blocks.0.mlp.fc1.weight", "blocks.1.mlp.fc1.weight")),
        (Half.LANGUAGE, ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight")),
    ],
)
def test_a_tensor_that_is_not_the_files_is_named(checkpoint, monkeypatch, fault, half, pair):
    """The plain form would be computed of the same wrong values."""
    name, other = pair
    fault(monkeypatch, name, open_checkpoint(str(checkpoint)).half_entries(half)[other])
    with pytest.raises(SelfCheckFailed, match=rf"{half} half failed: tensor '{name}' was loaded with other values"):
        (vision_of if half is Half.VISION else language_of)(checkpoint)


@torch.inference_mode()
def test_the_plain_form_is_what_transformers_computes(checkpoint):
    """The check holds our halves to it, so it is held to the library here."""
    opened = open_checkpoint(str(checkpoint))
    form, exam = opened.family.plain(opened, torch.float32), check_exam(opened, 512)
    image = check_image(opened)
    tower, preprocessor = load_vision_tower(opened, torch.float32), Preprocessor(opened.preprocessor)
    patches = preprocessor(image, 1, image.width * image.height)
    pixels = torch.from_numpy(preprocessor.pixel_values(patches))
    rows = tower(pixels, torch.tensor([patches.grid_thw])).pooler_output
    torch.testing.assert_close(form.rows(image), rows, atol=2e-5, rtol=0)
    model, head = load_language_model(opened, torch.float32)
    scores = []
    for question in exam.questions:
        ids = torch.tensor([[*question.token_ids, question.choices[-1][0]]])
        hidden = model.embed_tokens(ids)
        hidden[0, 1 : 1 + exam.rows.shape[1]] = exam.rows[0]
        places = np.concatenate([question.positions, np.full((3, 1), question.next_position)], axis=1)
        out = model(inputs_embeds=hidden, position_ids=torch.from_numpy(places)[:, None], use_cache=False)
        scores.append(head(out.last_hidden_state[0, -2:]))
    torch.testing.assert_close(plain_scores(form, exam), self_check.scores_of(scores, exam), atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", ["checkpoint", "window_checkpoint", "deepstack_checkpoint"])
def test_what_verify_records_is_what_the_halves_compute(kind, request, tmp_path):
    """Of the class itself, rows of a deepstack with it; taken along by a split, it is what the halves compare with."""
    path = shutil.copytree(request.getfixturevalue(kind), tmp_path / "model")
    opened = open_checkpoint(str(path))
    job = {"model": str(path), "dtype": "float32", "device": "cpu", "threads": 1}
    with torch.inference_mode():
        numbers = unsplit._recorded(unsplit.Unsplit(job), str(path))
    form, image = opened.family.plain(opened, torch.float32), check_image(opened)
    assert difference(numbers["vision"], form.rows(image).flatten().tolist()) < 2e-5
    assert difference(numbers["language"], plain_scores(form, check_exam(opened, 512))) < 2e-5
    for half in Half:
        recorded.write(opened, half, numbers[half.value])
    split_checkpoint(str(path), tmp_path / "halves")
    with structlog.testing.capture_logs() as logs:
        vision_of(tmp_path / "halves" / "vision")
        language_of(tmp_path / "halves" / "language")
    passed = [line for line in logs if line["event"] == "self-check passed"]
    assert [line["against"] for line in passed] == ["its record"] * 2


def test_a_record_is_of_the_weights_without_an_adapter(checkpoint, tmp_path):
    """With one that changes the half, its plain form counts; a damaged record is not taken along."""
    path, _ = recorded_copy(checkpoint, tmp_path)
    lora = adapter(tmp_path / "lora", {"model.layers.0.self_attn.q_proj": (64, 64)})
    with structlog.testing.capture_logs() as logs:
        vision_of(path, adapter=str(lora))
        language_of(path, adapter=str(lora))
    passed = [line["against"] for line in logs if line["event"] == "self-check passed"]
    assert passed == ["its record", "its plain form"]
    file = path / recorded.FILES[Half.LANGUAGE]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"digest": "0"}))
    with pytest.raises(CheckpointError, match=r"lookonce-check-language.json is damaged"):
        split_checkpoint(str(path), tmp_path / "halves")


def recorded_copy(checkpoint, directory):
    """A checkpoint with a record of both halves."""
    path = shutil.copytree(checkpoint, directory / "model")
    opened = open_checkpoint(str(path))
    form = opened.family.plain(opened, torch.float32)
    recorded.write(opened, Half.VISION, form.rows(check_image(opened)).flatten().tolist())
    recorded.write(opened, Half.LANGUAGE, plain_scores(form, check_exam(opened, 512)))
    return path, opened


def test_a_record_is_what_counts_where_there_is_one(checkpoint, tmp_path, monkeypatch):
    path, opened = recorded_copy(checkpoint, tmp_path)
    monkeypatch.setattr(type(opened.family), "plain", None)  # never asked for
    vision_of(path)
    language_of(path)
    numbers = recorded.read(opened, Half.LANGUAGE)
    recorded.write(opened, Half.LANGUAGE, [numbers[0] + 0.1, *numbers[1:]])
    vision_of(path)
    with pytest.raises(SelfCheckFailed, match=r"language half failed: .* differ from its record by 0\.0"):
        language_of(path)


def test_a_record_is_bound_to_its_weights_and_whole(checkpoint, tmp_path):
    path, _ = recorded_copy(checkpoint, tmp_path)
    file = path / recorded.FILES[Half.VISION]
    other = make_random_checkpoint(tmp_path / "other", tied=False, seed=1)
    shutil.copy(file, other)
    with structlog.testing.capture_logs() as logs:
        vision_of(other)
    assert [line["event"] for line in logs if "record" in line["event"]]
    assert [line["against"] for line in logs if line["event"] == "self-check passed"] == ["its plain form"]
    stored = json.loads(file.read_text())
    file.write_text(json.dumps(stored | {"values": stored["values"][:-8] + "AAAAAAA="}))
    with pytest.raises(CheckpointError, match=r"lookonce-check-vision.json is damaged; .*--record"):
        vision_of(path)


def test_a_service_that_fails_ends_with_the_reason(checkpoint, tmp_path):
    path, opened = recorded_copy(checkpoint, tmp_path)
    recorded.write(opened, Half.VISION, [0.5 * number for number in recorded.read(opened, Half.VISION)])
    service = ServiceProcess("vision_service", "--model", str(path), "--device", "cpu")
    assert service.process.wait(60) == 78
    last = service.log.strip().splitlines()[-1]
    service.close()
    assert last.startswith("vision: error: self-check of the vision half failed: the rows of an image differ")
    assert "Nothing is served" in last and "lookonce verify" in last
