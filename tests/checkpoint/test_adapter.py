"""A LoRA adapter is merged into its base when a half is loaded, and changes the identity of the halves it changes."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lm_service.app import load as load_language
from lm_service.peers import AcceptedEncoders
from lm_service.settings import LanguageSettings
from lookonce.cli import checks
from lookonce.core.errors import CheckpointError
from lookonce.models.checkpoint import Half
from lookonce.models.checkpoint.check import check_checkpoint, open_checked
from lookonce.models.qwen2_vl.modules import load_language_model, load_vision_tower
from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from tests.checkpoint import quantisers
from tests.checkpoint.test_quantised import FORMATS
from tests.cli.commands import invoke
from vision_service.app import load as load_vision
from vision_service.settings import VisionSettings

LANGUAGE = {
    "model.layers.0.self_attn.q_proj": (64, 64),
    "model.layers.1.mlp.down_proj": (64, 128),
    "model.layers.1.self_attn.v_proj": (32, 64),
}
TOWER = {"visual.blocks.1.attn.qkv": (192, 64), "visual.merger.mlp.2": (64, 256)}
CONVOLUTION = {"visual.patch_embed.proj": (64, 3, 2, 14, 14)}
CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": "Qwen/Qwen2-VL-2B-Instruct",
    "r": 4,
    "lora_alpha": 6,
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "init_lora_weights": True,
    "use_dora": False,
    "use_rslora": False,
    "bias": "none",
    "task_type": "CAUSAL_LM",
}


def adapter(path: Path, modules: dict[str, tuple[int, ...]], *, seed=0, r=4, whole=(), rename=str, **config) -> Path:
    """As PEFT's save_pretrained writes it. `whole`: weights that were trained whole, by name."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, shape in modules.items():
        a, b = (r, *shape[1:]), (shape[0], r, *(1 for _ in shape[2:]))
        for letter, sides in (("A", a), ("B", b)):
            values = torch.randn(sides, generator=generator) / 8
            tensors[f"base_model.model.{rename(module)}.lora_{letter}.weight"] = values
    tensors |= {f"base_model.model.{name}": tensor for name, tensor in dict(whole).items()}
    path.mkdir(parents=True)
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return path


def merged(path: Path, base: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """W + scale * B A for every pair, in double precision."""
    values = dict(base)
    tensors = load_file(path / "adapter_model.safetensors")
    for name, a in tensors.items():
        if name.endswith("lora_A.weight"):
            b = tensors[name.replace("lora_A", "lora_B")]
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            delta = torch.einsum("or,ri->oi", b.double().flatten(1), a.double().flatten(1)) * scale
            weight = values[f"{module}.weight"]
            values[f"{module}.weight"] = (weight.double() + delta.view(weight.shape)).float()
    return values


def states(path: Path, adapter: Path | None) -> dict[str, torch.Tensor]:
    """Both halves as they are loaded, by their published names."""
    source = None if adapter is None else str(adapter)
    model, head = load_language_model(open_checked(str(path), Half.LANGUAGE, adapter=source), torch.float32)
    tower = load_vision_tower(open_checked(str(path), Half.VISION, adapter=source), torch.float32)
    found = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    found |= {f"visual.{name}": tensor for name, tensor in tower.state_dict().items()}
    return found | {"lm_head.weight": head.weight}


def fingerprint(path: Path, half: Half, adapter: Path | None) -> str:
    source = None if adapter is None else str(adapter)
    return open_checked(str(path), half, adapter=source).encoder_spec("float32").fingerprint()


@pytest.mark.parametrize(
    ("settings", "scale"),
    [({}, 6 / 4), ({"use_rslora": True}, 6 / 2), ({"alpha_pattern": {"layers.9.mlp.up_proj": 99}}, 6 / 4)],
)
def test_what_was_trained_is_added(tiny, tmp_path, settings, scale):
    path = adapter(tmp_path / "lora", LANGUAGE | TOWER | CONVOLUTION, **settings)
    plain, ours = states(tiny, None), states(tiny, path)
    expected = merged(path, plain, scale)
    changed = {name for name, tensor in ours.items() if not torch.equal(tensor, plain[name])}
    assert changed == {f"{module}.weight" for module in LANGUAGE | TOWER | CONVOLUTION}
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0)


def test_patterns_give_modules_ranks_and_factors_of_their_own(tiny, tmp_path):
    path = adapter(tmp_path / "lora", LANGUAGE, alpha_pattern={r"layers.\d.mlp.down_proj": 20, "q_proj": 2})
    plain, ours = states(tiny, None), states(tiny, path)
    for module, scale in zip(LANGUAGE, (2 / 4, 20 / 4, 6 / 4), strict=True):
        name = f"{module}.weight"
        torch.testing.assert_close(ours[name], merged(path, plain, scale)[name], atol=1e-6, rtol=0)


def test_newer_names_are_the_same_modules(tiny, tmp_path):
    def rename(module):
        return f"model.{module}" if module.startswith("visual") else module.replace("model.", "model.language_model.")

    paths = [adapter(tmp_path / name, LANGUAGE | TOWER, rename=way) for name, way in (("old", str), ("new", rename))]
    old, new = (states(tiny, path) for path in paths)
    assert all(torch.equal(tensor, new[name]) for name, tensor in old.items())
    assert fingerprint(tiny, Half.VISION, paths[0]) == fingerprint(tiny, Half.VISION, paths[1])


def test_weights_that_were_trained_whole_take_the_place_of_the_base_models(tiny, tmp_path):
    bias = "model.layers.0.self_attn.q_proj{}.bias"
    whole = {"lm_head.weight": torch.randn(512, 64), bias.format(".base_layer"): torch.randn(64)}
    path = adapter(tmp_path / "lora", LANGUAGE, whole=whole, modules_to_save=["lm_head"], bias="lora_only")
    plain, ours = states(tiny, None), states(tiny, path)
    assert torch.equal(ours["lm_head.weight"], whole["lm_head.weight"])
    assert torch.equal(ours[bias.format("")], whole[bias.format(".base_layer")])
    assert torch.equal(ours["model.embed_tokens.weight"], plain["model.embed_tokens.weight"]), "untied now"


def test_an_embedding_that_was_trained(tmp_path):
    path = make_random_checkpoint(tmp_path / "model", tied=False)
    tensors = {"A": torch.randn(4, 512), "B": torch.randn(64, 4)}
    whole = {f"model.embed_tokens.lora_embedding_{name}": tensor for name, tensor in tensors.items()}
    lora = adapter(tmp_path / "lora", {}, whole=whole)
    plain, ours = states(path, None), states(path, lora)
    delta = (tensors["B"] @ tensors["A"]).t() * 1.5
    torch.testing.assert_close(ours["model.embed_tokens.weight"] - plain["model.embed_tokens.weight"], delta)


def test_a_quantised_base(tmp_path):
    base = make_random_checkpoint(tmp_path / "base", hidden=128, ffn=320)
    made = quantisers.quantised(base, tmp_path / "made", *FORMATS["gptq"])
    path = adapter(tmp_path / "lora", {"model.layers.0.self_attn.q_proj": (128, 128)})
    plain, ours = states(made / "plain", path), states(made / "quantised", path)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in ours.items())


def test_the_tower_has_another_identity_where_it_was_trained_and_there_alone(tiny, tmp_path):
    language = adapter(tmp_path / "language", LANGUAGE)
    tower = adapter(tmp_path / "tower", LANGUAGE | TOWER)
    other = adapter(tmp_path / "other", LANGUAGE | TOWER, seed=1)
    again = adapter(tmp_path / "again", LANGUAGE | TOWER, lora_dropout=0.1)
    stronger = adapter(tmp_path / "stronger", LANGUAGE | TOWER, lora_alpha=7)
    base = fingerprint(tiny, Half.VISION, None)
    assert fingerprint(tiny, Half.VISION, language) == base
    prints = {fingerprint(tiny, Half.VISION, path) for path in (tower, other, stronger)}
    assert len(prints | {base}) == 4
    assert fingerprint(tiny, Half.LANGUAGE, tower) == fingerprint(tiny, Half.VISION, tower)
    assert fingerprint(tiny, Half.VISION, again) == fingerprint(tiny, Half.VISION, tower)


def test_services_doctor_and_up_take_it(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # doctor sets it
    path = adapter(tmp_path / "lora", LANGUAGE | TOWER)
    vision = load_vision(VisionSettings(model=str(tiny), adapter=str(path), kernels="torch"))
    language = load_language(LanguageSettings(model=str(tiny), adapter=str(path), kernels="torch"))
    accepted = AcceptedEncoders.of(language.checkpoint, "float32", "none")
    assert vision.model.fingerprint in accepted.fingerprints
    assert vision.model.fingerprint == fingerprint(tiny, Half.VISION, path)
    assert vision.checkpoint.encoder_identity != vision.checkpoint.identity == language.checkpoint.identity
    (finding, *_), _ = checks.check_checkpoint(str(tiny), None, None, str(path))
    assert finding.status == "ok" and f"adapter {path} merged into it" in finding.detail


REFUSED = {
    "DoRA": (lambda p: adapter(p, LANGUAGE, use_dora=True), "DoRA is not supported"),
    "another method": (lambda p: adapter(p, LANGUAGE, peft_type="IA3"), "IA3 is not supported"),
    "PiSSA": (lambda p: adapter(p, LANGUAGE, init_lora_weights="pissa_niter_16"), "init_lora_weights pissa_niter_16"),
    "biases of B": (lambda p: adapter(p, LANGUAGE, lora_bias=True), "biases of B (lora_bias)"),
    "rows of tokens": (lambda p: adapter(p, LANGUAGE, trainable_token_indices=[1]), "single tokens' rows"),
    "another model's modules": (lambda p: adapter(p, {"transformer.h.0.attn": (8, 8)}), "not what LoRA has of a Qwen2"),
    "magnitudes": (
        lambda p: adapter(p, LANGUAGE, whole={"model.layers.0.lora_magnitude_vector": torch.ones(2)}),
        "model.layers.0.lora_magnitude_vector: not what LoRA has",
    ),
    "another size": (
        lambda p: adapter(p, {"model.layers.0.self_attn.q_proj": (32, 32)}),
        "don't fit the model, which has shape [64, 64]",
    ),
    "a layer too many": (lambda p: adapter(p, {"model.layers.7.mlp.up_proj": (128, 64)}), "which has no such weight"),
    "a tied embedding": (
        lambda p: adapter(p, {}, whole={"model.embed_tokens.weight": torch.ones(512, 64)}),
        "the embedding of a model whose output head is tied",
    ),
    "no weights": (
        lambda p: (adapter(p, LANGUAGE) / "adapter_model.safetensors").unlink(),
        "has no adapter_model.safetensors",
    ),
    "no directory": (lambda p: None, "no such directory, and not a hub id"),
    "something else": (lambda p: p.mkdir(), "has no adapter_config.json: not a LoRA adapter"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_merged_is_refused_by_name(tiny, tmp_path, name):
    make, said = REFUSED[name]
    make(tmp_path / "lora")
    (problem,) = check_checkpoint(str(tiny), adapter=str(tmp_path / "lora")).problems
    assert said in problem and "; " in problem
    with pytest.raises(CheckpointError) as refused:
        load_language(LanguageSettings(model=str(tiny), adapter=str(tmp_path / "lora")))
    assert refused.value.problems == (problem,)
    up = invoke("up", "--model", tiny, "--adapter", tmp_path / "lora", "--data-dir", tmp_path / "data", "--port", "0")
    assert (up.returncode, up.stderr.strip()) == (1, f"lookonce: error: {CheckpointError(problem).message}")


def test_an_adapter_given_as_the_model_is_told_how_to_be_given(tmp_path):
    path = adapter(tmp_path / "lora", LANGUAGE)
    base = "Qwen/Qwen2-VL-2B-Instruct"
    (problem,) = check_checkpoint(str(path)).problems
    assert f"a LoRA adapter of {base}; give that model with --model {base} and this with --adapter {path}" in problem


def test_a_rank_of_its_own_counts_for_the_factor(tiny, tmp_path):
    path = adapter(tmp_path / "lora", LANGUAGE, r=9, use_rslora=True)
    assert json.loads((path / "adapter_config.json").read_text())["r"] == 4, "the tensors decide, as with rank_pattern"
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = merged(path, states(tiny, None), 6 / math.sqrt(9))[name]
    torch.testing.assert_close(states(tiny, path)[name], expected, atol=1e-6, rtol=0)
