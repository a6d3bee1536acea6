"""Each half loaded alone computes what the unsplit model computes; nothing is loaded loosely or twice."""

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLForConditionalGeneration

from lookonce.core.errors import CheckpointError
from lookonce.models.checkpoint import Half, open_checkpoint
from lookonce.models.checkpoint.split import split_checkpoint
from lookonce.models.checkpoint.weights import load_weights
from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from tests.modules import load_language_model, load_vision_tower

GRIDS = torch.tensor([[1, 6, 8], [1, 4, 2]])


@pytest.fixture
def pixel_values():
    torch.manual_seed(5)
    return torch.randn(int(GRIDS.prod(-1).sum()), 1176)


def prompt(config):
    def image(tokens):
        return [config.vision_start_token_id, *[config.image_token_id] * tokens, config.vision_end_token_id]

    return torch.tensor([[40, 41, *image(12), 42, *image(2), 43, 44, 45]])


def both(path, pixel_values, vision, language, dtype=torch.float32):
    """Features and logits of the unsplit model and of the two halves."""
    whole = Qwen2VLForConditionalGeneration.from_pretrained(path, dtype=dtype).eval()
    ids = prompt(whole.config)
    marks = (ids == whole.config.image_token_id).int()
    tower = load_vision_tower(open_checkpoint(str(vision), needs=Half.VISION), dtype)
    model, head = load_language_model(open_checkpoint(str(language), needs=Half.LANGUAGE), dtype)
    with torch.inference_mode():
        expected = torch.cat(tuple(whole.get_image_features(pixel_values, GRIDS).pooler_output))
        logits = whole(input_ids=ids, pixel_values=pixel_values, image_grid_thw=GRIDS, mm_token_type_ids=marks).logits
        positions, _ = whole.model.get_rope_index(ids, marks, image_grid_thw=GRIDS)
        features = tower(pixel_values, GRIDS).pooler_output
        embeds = model.embed_tokens(ids)
        embeds[marks.bool()] = features
        ours = head(model(inputs_embeds=embeds, position_ids=positions).last_hidden_state)
    return expected, features, logits, ours


@pytest.mark.parametrize(
    ("layout", "tied", "shards", "dimensions"),
    [
        ("published", True, 1, {}),
        ("published", False, 3, {}),
        ("nested", True, 2, {}),
        ("nested", False, 4, {}),
        ("published", True, 1, {"hidden": 112, "heads": 7, "kv_heads": 1, "vision_width": 96, "vision_heads": 3}),
    ],
)
def test_the_halves_equal_the_unsplit_model(tmp_path, pixel_values, layout, tied, shards, dimensions):
    path = make_random_checkpoint(tmp_path / "model", layout=layout, tied=tied, shards=shards, **dimensions)
    expected, features, logits, ours = both(path, pixel_values, path, path)
    assert torch.equal(features, expected)
    assert torch.equal(ours, logits)


def test_split_halves_equal_the_unsplit_model_in_bfloat16(tmp_path, pixel_values):
    path = make_random_checkpoint(tmp_path / "model", dtype="bfloat16", tied=False, shards=2)
    split_checkpoint(str(path), tmp_path / "out")
    for dtype in (torch.bfloat16, torch.float32):
        out = tmp_path / "out"
        expected, features, logits, ours = both(path, pixel_values, out / "vision", out / "language", dtype)
        assert features.dtype is dtype
        assert torch.equal(features, expected)
        assert torch.equal(ours, logits)


def test_layouts_shards_and_dtypes_of_one_seed_are_one_model(tmp_path):
    one = make_random_checkpoint(tmp_path / "one", shards=3)
    two = make_random_checkpoint(tmp_path / "two", layout="nested", dtype="bfloat16")
    other = make_random_checkpoint(tmp_path / "other", seed=1)
    states = [load_vision_tower(open_checkpoint(str(p)), torch.bfloat16).state_dict() for p in (one, two, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["blocks.0.attn.qkv.weight"], states[2]["blocks.0.attn.qkv.weight"])


def test_modules_are_whole_frozen_and_tied(tiny, sharded):
    tower = load_vision_tower(open_checkpoint(str(tiny)), torch.float16)
    model, head = load_language_model(open_checkpoint(str(tiny)), torch.float16)
    assert head.weight is model.embed_tokens.weight
    untied, own_head = load_language_model(open_checkpoint(str(sharded)), torch.float32)
    assert own_head.weight.data_ptr() != untied.embed_tokens.weight.data_ptr()
    for module in (tower, model, head):
        assert not module.training
        assert not any(p.requires_grad or p.is_meta or p.dtype is not torch.float16 for p in module.parameters())
    for rotary in (tower.rotary_pos_emb, model.rotary_emb):
        assert rotary.inv_freq.dtype is torch.float32
        assert rotary.inv_freq[0] == 1.0 and torch.all(rotary.inv_freq > 0)
        assert torch.equal(rotary.inv_freq, rotary.original_inv_freq)


def test_a_stored_head_of_a_tied_config_is_used_as_transformers_uses_it(tmp_path, pixel_values):
    path = make_random_checkpoint(tmp_path / "model", tied=False)
    config = json.loads((path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (path / "config.json").write_text(json.dumps(config))
    _, _, logits, ours = both(path, pixel_values, path, path)
    assert torch.equal(ours, logits)


def damage(tiny, tmp_path, change):
    own = shutil.copytree(tiny, tmp_path / "own")
    tensors = load_file(own / "model.safetensors")
    change(tensors)
    save_file(tensors, own / "model.safetensors", metadata={"format": "pt"})
    return open_checkpoint(str(own))


def test_a_tensor_of_the_wrong_shape(tiny, tmp_path):
    name = "visual.merger.mlp.2.bias"
    checkpoint = damage(tiny, tmp_path, lambda t: t.update({name: torch.zeros(65)}))
    with pytest.raises(
        CheckpointError, match=rf"model\.safetensors: tensor '{name}' has shape \[65\].*asks for \[64\]"
    ):
        load_vision_tower(checkpoint, torch.float32)
    load_language_model(checkpoint, torch.float32)


def test_a_missing_tensor(tiny, tmp_path):
    checkpoint = damage(tiny, tmp_path, lambda t: [t.pop("visual.merger.mlp.2.bias"), t.pop("model.norm.weight")])
    with pytest.raises(CheckpointError, match=r"tensors missing from the weights: merger\.mlp\.2\.bias; download"):
        load_vision_tower(checkpoint, torch.float32)
    with pytest.raises(CheckpointError, match=r"tensors missing from the weights: model\.norm\.weight; download"):
        load_language_model(checkpoint, torch.float32)


def test_an_untied_config_needs_a_head(tiny, tmp_path):
    own = shutil.copytree(tiny, tmp_path / "own")
    config = json.loads((own / "config.json").read_text()) | {"tie_word_embeddings": False}
    (own / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"missing from the weights: lm_head\.weight"):
        load_language_model(open_checkpoint(str(own)), torch.float32)


def test_unexpected_tensors(tiny, tmp_path):
    more = {f"visual.blocks.{n}.attn.gate": torch.zeros(1) for n in range(7)}
    checkpoint = damage(tiny, tmp_path, lambda t: t.update(more))
    with pytest.raises(CheckpointError, match=r"no place for: visual\.blocks\.0\.attn\.gate.* and 2 more"):
        load_vision_tower(checkpoint, torch.float32)


def test_integer_weights(tiny, tmp_path):
    checkpoint = damage(
        tiny, tmp_path, lambda t: t.update({"visual.merger.mlp.2.bias": torch.zeros(64).to(torch.int8)})
    )
    with pytest.raises(CheckpointError, match=r"stored as I8; supported: F64, F32, F16, BF16.*unquantised"):
        load_vision_tower(checkpoint, torch.float32)


def test_a_file_that_shrinks_between_opening_and_loading(tiny, tmp_path):
    checkpoint = damage(tiny, tmp_path, lambda t: None)
    file = checkpoint.files(Half.VISION)[0]
    with open(file, "r+b") as stream:
        stream.truncate(file.stat().st_size - 4)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: ends inside tensor 'visual\..*download it again"):
        load_vision_tower(checkpoint, torch.float32)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load_vision_tower(checkpoint, torch.float32)


def test_a_module_of_another_architecture_is_refused_before_reading(tiny):
    checkpoint = open_checkpoint(str(tiny))
    with torch.device("meta"):
        module = torch.nn.Linear(3, 3)
    with pytest.raises(CheckpointError, match="tensors missing from the weights: bias, weight"):
        load_weights(module, checkpoint, Half.VISION, dtype=torch.float32, device="cpu")


def process(file, key):
    """A figure of this process, in bytes."""
    unit = 1024 if file == "status" else 1
    lines = Path("/proc/self", file).read_text().splitlines()
    return next(int(line.split()[1]) * unit for line in lines if line.startswith(key))


@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_memory_and_reads_are_those_of_the_half_alone(tmp_path, tiny, stored):
    # Wide enough for a second copy of the weights to stand out from the interpreter's own noise.
    wide = {"vision_depth": 10, "vision_width": 512}
    path = make_random_checkpoint(tmp_path / "model", size="small", dtype=stored, shards=2, **wide)
    fingerprint = open_checkpoint(str(path)).encoder_spec("float32").fingerprint()  # the first start hashes everything
    load_vision_tower(open_checkpoint(str(tiny)), torch.float32)  # first use of everything
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    resident, read = process("status", "VmRSS"), process("io", "rchar")
    checkpoint = open_checkpoint(str(path), needs=Half.VISION)
    assert checkpoint.encoder_spec("float32").fingerprint() == fingerprint
    tower = load_vision_tower(checkpoint, torch.float32)
    peak, read = process("status", "VmHWM") - resident, process("io", "rchar") - read
    held = sum(parameter.nbytes for parameter in tower.parameters())
    assert held > 140_000_000
    assert peak <= held * 1.15 + 48_000_000
    assert checkpoint.weight_bytes(Half.VISION) <= read <= checkpoint.weight_bytes(Half.VISION) * 1.01
