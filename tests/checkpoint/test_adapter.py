"""A LoRA adapter is merged into its base when a half is loaded, and changes the identity of the halves it changes."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

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
from tests.checkpoint.loras import adapter
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


def merged(path: Path, base: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """W + scale * B A for every pair, in double precision; its rows as long as DoRA says."""
    values = dict(base)
    tensors = load_file(path / "adapter_model.safetensors")
    for name, a in tensors.items():
        if name.endswith("lora_A.weight"):
            b = tensors[name.replace("lora_A", "lora_B")]
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            delta = torch.einsum("or,ri->oi", b.double().flatten(1), a.double().flatten(1)) * scale
            weight = values[f"{module}.weight"]
            summed = (weight.double() + delta.view(weight.shape)).flatten(1)
            if (lengths := tensors.get(name.replace("lora_A.weight", "lora_magnitude_vector"))) is not None:
                summed *= (lengths.double() / summed.square().sum(1).sqrt())[:, None]
            values[f"{module}.weight"] = summed.view(weight.shape).float()
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
    [
        ({}, 6 / 4),
        ({"use_rslora": True}, 6 / 2),
        ({"alpha_pattern": {"layers.9.mlp.up_proj": 99}}, 6 / 4),
        ({"use_dora": True}, 6 / 4),
        ({"use_dora": True, "use_rslora": True}, 6 / 2),
    ],
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


def embedding_adapter(path, *, use_dora=False):
    tensors = {"A": torch.randn(4, 512), "B": torch.randn(64, 4)}
    whole = {f"model.embed_tokens.lora_embedding_{name}": tensor for name, tensor in tensors.items()}
    if use_dora:
        whole["model.embed_tokens.lora_magnitude_vector"] = torch.rand(64) + 0.5
    return adapter(path, {}, whole=whole, use_dora=use_dora), (tensors["B"] @ tensors["A"]).t() * 1.5


def test_dora_of_an_embedding_gives_its_columns_their_length(tmp_path):
    path = make_random_checkpoint(tmp_path / "model", tied=False)
    lora, delta = embedding_adapter(tmp_path / "lora", use_dora=True)
    ours, plain = (states(path, one)["model.embed_tokens.weight"] for one in (lora, None))
    lengths = load_file(lora / "adapter_model.safetensors")["base_model.model.model.embed_tokens.lora_magnitude_vector"]
    torch.testing.assert_close(ours.norm(dim=0), lengths)
    torch.testing.assert_close(ours / ours.norm(dim=0), (plain + delta) / (plain + delta).norm(dim=0))


def test_one_of_a_tied_pair_is_changed_alone_as_in_pefts_own_forward(tiny, tmp_path):
    """PEFT's merge_and_unload would change the other one too, and answer otherwise than the adapter it merged."""
    plain = states(tiny, None)
    assert torch.equal(plain["lm_head.weight"], plain["model.embed_tokens.weight"])
    lora, delta = embedding_adapter(tmp_path / "embedding")
    changed = states(tiny, lora)
    torch.testing.assert_close(changed["model.embed_tokens.weight"], plain["model.embed_tokens.weight"] + delta)
    assert torch.equal(changed["lm_head.weight"], plain["lm_head.weight"])
    path = adapter(tmp_path / "head", {"lm_head": (512, 64)})
    changed = states(tiny, path)
    assert torch.equal(changed["model.embed_tokens.weight"], plain["model.embed_tokens.weight"])
    expected = merged(path, plain, 1.5)["lm_head.weight"]
    torch.testing.assert_close(changed["lm_head.weight"], expected, atol=1e-6, rtol=0)
    whole = adapter(tmp_path / "whole", {}, whole={"model.embed_tokens.weight": torch.ones(512, 64)})
    changed = states(tiny, whole)
    assert torch.equal(changed["model.embed_tokens.weight"], torch.ones(512, 64))
    assert torch.equal(changed["lm_head.weight"], plain["lm_head.weight"])
    assert load_language(LanguageSettings(model=str(tiny), adapter=str(path), kernels="torch")).engine


def test_plan_knows_an_adapter(tiny, tmp_path):
    """By config.json alone, with the commands that take it; one that unties a head makes the weights larger."""
    bare = tmp_path / "bare"
    shutil.copytree(tiny, bare, ignore=shutil.ignore_patterns("*.safetensors*"))
    language, head = adapter(tmp_path / "lora", LANGUAGE | TOWER), adapter(tmp_path / "head", {"lm_head": (512, 64)})
    parameters = []
    for model, lora in ((bare, None), (bare, language), (tiny, language), (bare, head)):
        done = invoke("plan", "--model", model, "--ram", "4", *(("--adapter", lora) if lora else ()))
        assert done.returncode == 0, done.stderr
        assert (f"--adapter {lora}" in done.stdout) is (lora is not None)
        parameters.append(int(re.search(r"language weights.*?([0-9,]+) parameters", done.stdout)[1].replace(",", "")))
    assert parameters == [parameters[0]] * 3 + [parameters[0] + 512 * 64]
    other = adapter(tmp_path / "other", {"model.layers.0.self_attn.q_proj": (32, 32)})
    refused = [invoke("plan", "--model", model, "--ram", "4", "--adapter", other) for model in (bare, tiny)]
    assert all(one.returncode == 1 and "which has shape [64, 64]" in one.stderr for one in refused)
    assert len({one.stderr for one in refused}) == 1


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


def rewritten(path, **changes):
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return path


REFUSED = {
    "DoRA without magnitudes": (
        lambda p: rewritten(adapter(p, LANGUAGE), use_dora=True),
        "model.layers.0.self_attn.q_proj.lora_A.weight",
    ),
    "LoftQ": (lambda p: adapter(p, LANGUAGE, init_lora_weights="loftq"), "init_lora_weights loftq"),
    "weights that stay tied": (lambda p: adapter(p, LANGUAGE, ensure_weight_tying=True), "(ensure_weight_tying)"),
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
