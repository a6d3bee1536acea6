"""Quantised checkpoints as libraries publish them are the model that their tensors stand for."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lookonce.cli import checks
from lookonce.core.errors import CheckpointError
from lookonce.models.checkpoint import Half, open_checkpoint
from lookonce.models.checkpoint.check import check_checkpoint, open_checked
from lookonce.models.checkpoint.quantised.formats import format_of
from lookonce.models.checkpoint.split import split_checkpoint
from lookonce.models.qwen2_vl.modules import load_language_model, load_vision_tower
from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from tests.checkpoint import quantisers as q
from tests.checkpoint.loras import adapter
from tests.cli.commands import invoke
from tests.engine.lab import Lab, an_image, ask, generation, prompt, words
from tests.families.tiny_checkpoints import make


def ct(kind="pack-quantized", **weights):
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, **weights}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:visual.*"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
    }


def gptq(bits=4, group_size=32, **rest):
    return {"quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": False, "sym": True, **rest}


def auto_round(packing="auto_round:auto_gptq", **rest):
    settings = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True, "data_type": "int", **rest}
    return settings | {"packing_format": packing, "block_name_to_quantize": "model.layers"}


AWQ = {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm", "modules_to_not_convert": ["visual"]}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "load_in_8bit": False}
FORMATS = {
    "gptq": (q.gptq(), gptq()),
    "gptq 128 asym": (q.gptq(group_size=128, sym=False), gptq(group_size=128, sym=False)),
    "gptq 8": (q.gptq(8, 128, sym=False), gptq(8, 128, sym=False)),
    "gptq of columns": (q.gptq(group_size=-1), gptq(group_size=-1)),
    "gptq desc_act": (q.gptq(desc_act=True, sym=False), gptq(desc_act=True, sym=False)),
    "gptq_v2": (q.gptq(sym=False, v2=True), gptq(sym=False, checkpoint_format="gptq_v2")),
    "gptq of GPTQModel": (
        q.gptq(sym=False, whole_words=True),
        gptq(sym=False, checkpoint_format="gptq", meta={"quantizer": ["gptqmodel:4.0.0"]}),
    ),
    "gptq 3": (q.gptq(3, sym=False), gptq(3, sym=False)),
    "gptq_v2 3 desc_act": (
        q.gptq(3, sym=False, desc_act=True, v2=True),
        gptq(3, sym=False, desc_act=True, checkpoint_format="gptq_v2"),
    ),
    "gptq 3 of GPTQModel": (
        q.gptq(3, sym=False, whole_words=True),
        gptq(3, sym=False, meta={"quantizer": ["gptqmodel:5.8.0"]}),
    ),
    "gptq 3 of GPTQModel 7": (q.gptq(3, sym=False), gptq(3, sym=False, meta={"quantizer": ["gptqmodel:7.0.0"]})),
    "auto-round": (q.gptq(index=False), auto_round()),
    "auto-round 3": (q.gptq(3, 64, sym=False, v2=True, index=False), auto_round("auto_round", bits=3, group_size=64)),
    "auto-round 5": (q.gptq(5, sym=False, v2=True), auto_round("auto_round:gptqmodel", bits=5)),
    "auto-round awq": (q.awq(), auto_round("auto_round:auto_awq")),
    "gptq without g_idx": (q.gptq(group_size=128, index=False), gptq(group_size=128)),
    "gptq with spare biases": (q.gptq(), gptq()),
    "awq": (q.awq(), AWQ | {"group_size": 32}),
    "awq 64": (q.awq(64), AWQ | {"group_size": 64}),
    "awq of columns": (q.awq(-1), AWQ | {"group_size": -1}),
    "awq gemv": (q.gemv(), AWQ | {"group_size": 32, "version": "GEMV"}),
    "awq gemv 64": (q.gemv(64), AWQ | {"group_size": 64, "version": "gemv"}),
    "awq gemv_fast": (q.gemv(64, fast=True), AWQ | {"group_size": 64, "version": "gemv_fast"}),
    "packed": (q.packed(), ct()),
    "packed asym": (q.packed(sym=False), ct(symmetric=False)),
    "packed 8": (q.packed(8, -1), ct(num_bits=8, strategy="channel", group_size=None)),
    "packed actorder": (q.packed(actorder=True, sym=False), ct(symmetric=False, actorder="group")),
    "packed 3": (q.packed(3, sym=False), ct(num_bits=3, symmetric=False)),
    "packed 5 of columns": (q.packed(5, -1), ct(num_bits=5, strategy="channel", group_size=None)),
    "nvfp4": (q.fp4(), ct("nvfp4-pack-quantized", type="float", strategy="tensor_group", group_size=16)),
    "mxfp4": (q.fp4("mxfp4"), ct("mxfp4-pack-quantized", type="float")),
    "mxfp8": (q.mxfp8(), ct("mxfp8-quantized", type="float", num_bits=8)),
    "modelopt nvfp4": (q.fp4("modelopt"), {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}),
    "modelopt fp8": (q.float8("weight_scale", None), {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "int": (q.int_quantised(), ct("int-quantized", num_bits=8, strategy="channel", group_size=None)),
    "int asym": (q.int_quantised(sym=False), ct("int-quantized", num_bits=8, strategy="channel", group_size=None)),
    "int of all": (q.int_quantised(tensor=True), ct("int-quantized", num_bits=8, strategy="tensor", group_size=None)),
    "float": (
        q.float8("weight_scale", (1, 0), dtype=torch.bfloat16),
        ct("float-quantized", num_bits=8, type="float", strategy="channel", group_size=None),
    ),
    "float of all": (
        q.float8("weight_scale", None),
        ct("naive-quantized", num_bits=8, type="float", strategy="tensor", group_size=None),
    ),
    "float blocks": (
        q.float8("weight_scale", (128, 128)),
        ct(
            "float-quantized",
            num_bits=8,
            type="float",
            strategy="block",
            group_size=None,
            block_structure=[128, 128],
        ),
    ),
    "fp8": (q.float8(), FP8),
    "fp8 in bfloat16": (q.float8(block=(64, 32), dtype=torch.bfloat16), FP8 | {"weight_block_size": [64, 32]}),
    "fp8 of all": (q.float8("weight_scale", None), {"quant_method": "fp8", "activation_scheme": "static"}),
    "fp8 of rows": (q.float8("weight_scale", (1, 0), flat=True), {"quant_method": "fp8"}),
    "fbgemm": (q.float8("weight_scale", (1, 0)), {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
    "nf4": (q.four_bits(), BNB | {"bnb_4bit_use_double_quant": True}),
    "nf4, not nested": (q.four_bits(nested=False, dtype="float16"), BNB),
    "fp4": (q.four_bits("fp4", dtype="float32"), BNB | {"bnb_4bit_quant_type": "fp4"}),
    "int8": (q.int8(), BNB | {"load_in_4bit": False, "load_in_8bit": True, "llm_int8_skip_modules": ["visual"]}),
}
MIXED = ct("mixed-precision")
MIXED["config_groups"] |= {"group_1": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}}
FORMATS["mixed"] = (lambda w: (FORMATS["packed"] if w.shape[1] == 128 else FORMATS["float"])[0](w), MIXED)
CPU = torch.device("cpu")
ENGINES = ("gptq desc_act", "awq", "packed asym", "float", "fp8", "nf4", "int8")


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """Sides that no block of 128 divides, and keys narrower than it."""
    return make_random_checkpoint(tmp_path_factory.mktemp("plain") / "model", hidden=128, ffn=320)


def states(path: Path) -> dict[str, torch.Tensor]:
    model, head = load_language_model(open_checked(str(path), Half.LANGUAGE), torch.float32)
    return model.state_dict() | {"head": head.weight}


@pytest.fixture
def made(source, tmp_path, request) -> Path:
    quantiser, settings = FORMATS[request.param]
    made = q.quantised(source, tmp_path / "made", quantiser, settings, left=r"layers\.1\.mlp\.up_proj")
    if request.param == "gptq with spare biases":
        file = made / "quantised" / "model.safetensors"
        biases = {f"model.layers.{i}.self_attn.o_proj.bias": torch.zeros(128, dtype=torch.float16) for i in range(2)}
        save_file(load_file(file) | biases, file)
    return made


@pytest.mark.parametrize("made", FORMATS, indirect=True)
def test_the_weights_are_those_that_were_quantised(made):
    ours, plain = states(made / "quantised"), states(made / "plain")
    assert ours.keys() == plain.keys()
    wrong = [name for name, tensor in plain.items() if not torch.equal(ours[name], tensor)]
    assert not wrong


READ_AS = {
    "gptq": "GptqMatrix(shape=(128, 320), bits=4, groups=10, size=32, zeros='less one')",
    "gptq_v2 3 desc_act": "GptqMatrix(shape=(128, 320), bits=3, groups=10, size=32, zeros='as they are')",
    "gptq 3 of GPTQModel": "GptqMatrix(shape=(128, 320), bits=3, groups=10, size=32, zeros='less one, whole words')",
    "awq": "AwqMatrix(shape=(128, 320), groups=10)",
    "awq gemv": "GemvMatrix(shape=(128, 320), groups=10, size=32)",
    "awq gemv_fast": "GemvFastMatrix(shape=(128, 320), groups=5, size=64)",
    "packed 3": "PackedMatrix(shape=(128, 320), bits=3, block=(1, 32))",
    "int asym": (
        "ScaledMatrix(shape=(128, 320), label='int8', block=(1, 320), scale='weight_scale', zero='weight_zero_point')"
    ),
    "fp8": "ScaledMatrix(shape=(128, 320), label='float8', block=(128, 128), scale='weight_scale_inv', zero=None)",
    "int8": "Int8Matrix(shape=(128, 320))",
    "nvfp4": "Fp4Matrix(shape=(128, 320), packed='weight_packed', size=16, whole='weight_global_scale', divides=True)",
    "mxfp4": "Fp4Matrix(shape=(128, 320), packed='weight_packed', size=32, whole=None, divides=False)",
    "modelopt nvfp4": "Fp4Matrix(shape=(128, 320), packed='weight', size=16, whole='weight_scale_2', divides=False)",
    "nf4, not nested": (
        "FourBitMatrix(shape=(128, 320), label='nf4', block=64, nested_block=None, offset=0.0, dtype='float16')"
    ),
}


@pytest.mark.parametrize("made", READ_AS, indirect=True)
def test_how_a_matrix_is_read_is_told_in_the_same_words_for_ever(made, request):
    """They are in the fingerprint of a quantised tower: other words make other embeddings of what is stored."""
    entry = open_checkpoint(str(made / "quantised")).half_entries(Half.LANGUAGE)["model.layers.0.mlp.down_proj.weight"]
    assert repr(entry.matrix) == READ_AS[request.node.callspec.params["made"]]


@pytest.mark.parametrize("made", ENGINES, indirect=True)
async def test_answers_are_those_of_the_plain_model(made):
    ours, plain = Lab(made / "quantised"), Lab(made / "plain")
    wanted = prompt(words(5, 1), an_image(1), words(9, 2))
    async with ours.engine() as engine:
        (answer,) = await ask(engine, generation(wanted, 6))
    plain.album = ours.album
    plain.check(wanted, answer)


@pytest.mark.parametrize("made", ["awq", "nf4"], indirect=True)
def test_halves_that_are_split_keep_every_tensor_as_it_is_stored(made, tmp_path):
    path = made / "quantised"
    report = split_checkpoint(str(path), tmp_path / "halves")
    with safe_open(path / "model.safetensors", "pt") as whole:
        names = set(whole.keys())
    assert sum(report.tensors.values()) == len(names)
    assert sum(report.weight_bytes.values()) == sum(open_checkpoint(str(path)).weight_bytes(half) for half in Half)
    halves = check_checkpoint(str(tmp_path / "halves")).usable()
    ours, plain = states(tmp_path / "halves" / "language"), states(made / "plain")
    assert all(torch.equal(ours[name], tensor) for name, tensor in plain.items())
    assert load_vision_tower(halves[Half.VISION], torch.float32)


@pytest.mark.parametrize("name", ["nf4", "gptq", "fp8"])
def test_a_tower_that_is_quantised_too(source, tmp_path, name):
    quantiser, settings = FORMATS[name]
    also = r"visual\.blocks\.\d+\.mlp\.fc[12]\.weight"
    made = q.quantised(source, tmp_path / "made", quantiser, settings, also=also)
    ours, plain = (
        load_vision_tower(open_checked(str(made / kind), Half.VISION), torch.float32).state_dict()
        for kind in ("quantised", "plain")
    )
    assert all(torch.equal(ours[name], tensor) for name, tensor in plain.items())


@pytest.mark.parametrize("name", ["gptq", "auto-round"])
def test_a_quantised_tower_of_the_general_path(tmp_path, name):
    quantiser, settings = FORMATS[name]
    path = make("llava", tmp_path / "llava")
    pattern = r"vision_tower\..*layers\.\d+\.mlp\.fc[12]\.weight|multi_modal_projector\.linear_[12]\.weight"
    made = q.quantised(path, tmp_path / "made", quantiser, settings, also=pattern)
    quantised, plain = (open_checked(str(made / kind), Half.VISION) for kind in ("quantised", "plain"))
    assert "int4" in quantised.storage(Half.VISION)
    ours, theirs = (one.family.load_encoder(one, torch.float32, CPU) for one in (quantised, plain))
    image = Image.effect_noise((64, 48), 90).convert("RGB")
    ((rows,), (expected,)) = (one.encode([one.prepare(image, 1, 64 * 48)]) for one in (ours, theirs))
    assert torch.equal(rows, expected)
    assert quantised.vision_weights != plain.vision_weights


def test_a_quantised_tower_has_the_identity_of_what_is_stored(source, tmp_path):
    """Of the tensors and of how they are read: one for both halves and all copies, another for every other form."""
    also = r"visual\.blocks\.\d+\.mlp\.fc[12]\.weight"
    tensors_alike = {  # the same bytes, read otherwise
        "gptq": gptq(),
        "gptq_v2": gptq(checkpoint_format="gptq_v2"),
        "gptq of GPTQModel": gptq(meta={"quantizer": ["gptqmodel:5.0.0"]}),
    }
    found = {}
    for name, settings in tensors_alike.items():
        made = q.quantised(source, tmp_path / name, q.gptq(), settings, also=also) / "quantised"
        prints = [open_checked(str(made), half).encoder_spec("float32").fingerprint() for half in Half]
        assert prints[0] == prints[1]
        found[name] = prints[0]
    language_only = q.quantised(source, tmp_path / "language", q.gptq(), gptq()) / "quantised"
    found["plain"] = open_checked(str(source), Half.VISION).encoder_spec("float32").fingerprint()
    assert len(set(found.values())) == 4
    kept = open_checked(str(language_only), Half.VISION).encoder_spec("float32").fingerprint()
    assert kept == found["plain"], "what the language half is stored as doesn't matter"
    halves = split_checkpoint(str(tmp_path / "gptq" / "quantised"), tmp_path / "halves")
    apart = open_checked(str(tmp_path / "halves" / "vision"), Half.VISION).encoder_spec("float32").fingerprint()
    assert apart == found["gptq"] and halves.tensors


def test_settings_may_stand_in_a_file_of_their_own_or_in_text_config(source, tmp_path):
    quantiser, settings = FORMATS["gptq"]
    made = q.quantised(source, tmp_path / "made", quantiser, settings)
    path = made / "quantised"
    config = json.loads((path / "config.json").read_text())
    stated = config.pop("quantization_config")
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"by GPTQ .*which config.json's quantization_config doesn't say"):
        open_checked(str(path), Half.LANGUAGE)
    (path / "quantize_config.json").write_text(
        json.dumps({name: stated[name] for name in ("bits", "group_size", "desc_act")})
    )
    plain = states(made / "plain")
    assert all(torch.equal(tensor, plain[name]) for name, tensor in states(path).items())
    split_checkpoint(str(path), tmp_path / "halves")
    assert states(tmp_path / "halves" / "language").keys() == plain.keys()
    (path / "quantize_config.json").unlink()
    nested = {"text_config": {"quantization_config": stated}}
    assert format_of(path, nested, None) == format_of(path, {"quantization_config": stated}, None)


@pytest.mark.parametrize("made", ["gptq"], indirect=True)
def test_doctor_and_plan_know_bytes_stored_and_bytes_in_memory(made, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # doctor sets it
    checkpoint = open_checkpoint(str(made / "quantised"))
    plain = open_checkpoint(str(made / "plain"))
    assert checkpoint.storage(Half.LANGUAGE) == "GPTQ int4 and float32"
    assert checkpoint.storage(Half.VISION) == "float32"
    assert checkpoint.weight_bytes(Half.LANGUAGE) < 0.6 * plain.weight_bytes(Half.LANGUAGE)
    (finding, *_), sizes = checks.check_checkpoint(str(made / "quantised"), None)
    assert "599.6 KiB in GPTQ int4 and float32, computes in float32, 1.6 MiB in memory" in finding.detail
    _, plain_sizes = checks.check_checkpoint(str(made / "plain"), None)
    assert sizes == plain_sizes, "what it takes in memory is what the plain model takes"
    plan = invoke("plan", "--model", made / "quantised", "--ram", "4").stdout
    assert "language, stored as  599.6 KiB  GPTQ int4 and float32; dequantised" in plan
    assert "stored as" not in invoke("plan", "--model", made / "plain", "--ram", "4").stdout


REFUSED = {
    "another method": ({"quant_method": "aqlm"}, "weights quantised by aqlm are not supported"),
    "a marlin layout": (gptq(checkpoint_format="marlin"), "checkpoint_format 'marlin' is not supported"),
    "sparse": (ct("marlin-24"), "format 'marlin-24' is not supported"),
    "mxfp6": (ct("mxfp6-pack-quantized", type="float", num_bits=6), "format 'mxfp6-pack-quantized' is not supported"),
    "rotations": (ct() | {"transform_config": {"config_groups": {"R1": {}}}}, "rotations are not supported"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_by_all_in_the_same_words(source, tmp_path, name):
    settings, said = REFUSED[name]
    made = q.quantised(source, tmp_path / "made", FORMATS["gptq"][0], settings) / "quantised"
    problems = check_checkpoint(str(made)).problems
    assert len(problems) == 1 and said in problems[0] and "; use the original checkpoint" in problems[0]
    commands = [("split", made, tmp_path / "out"), ("plan", "--model", made, "--ram", "1")]
    commands += [("up", "--model", made, "--data-dir", tmp_path / "data", "--port", "0")]
    for command in commands:
        done = invoke(*command)
        assert (done.returncode, done.stderr.strip()) == (1, f"lookonce: error: {problems[0]}")


REFUSED_SETTINGS = {
    "five bits": (gptq(5), "bits 5 is not supported"),
    "planes of bits": (gptq(checkpoint_format="gptq_p"), "checkpoint_format 'gptq_p' is not supported"),
    "AWQ's marlin": (AWQ | {"version": "marlin"}, "version 'marlin' is not supported"),
    "hqq": ({"quant_method": "hqq"}, "weights quantised by hqq are not supported"),
    "quanto": ({"quant_method": "quanto", "weights": "int4"}, "weights quantised by quanto are not supported"),
    "torchao": ({"quant_method": "torchao"}, "weights quantised by torchao are not supported"),
    "mxfp4 of experts": ({"quant_method": "mxfp4"}, "weights quantised by mxfp4 are not supported"),
    "auto-round in another layout": (
        auto_round("auto_round:llm_compressor"),
        "packing_format 'auto_round:llm_compressor' is not supported",
    ),
    "auto-round in floats": (auto_round(data_type="mx_fp"), "data_type 'mx_fp' with act_bits 16 is not supported"),
    "auto-round rotated": (auto_round(rotation_config={"block": 32}), "rotation_config: rotations are not supported"),
    "modelopt's AWQ": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"},
        "quant_algo 'NVFP4_AWQ' is not supported",
    ),
}


@pytest.mark.parametrize(("settings", "said"), REFUSED_SETTINGS.values(), ids=REFUSED_SETTINGS)
def test_settings_that_are_not_known_are_refused_by_name(settings, said):
    with pytest.raises(CheckpointError) as refused:
        format_of(Path("model"), {"quantization_config": settings}, None)
    assert said in refused.value.message and "; use the original checkpoint" in refused.value.message


def damaged(made: Path, change) -> str:
    file = made / "quantised" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    (problem,) = check_checkpoint(str(made / "quantised"), needs=Half.LANGUAGE).problems
    return problem


K = "model.layers.0.self_attn.k_proj"
DAMAGED = {
    "a part missing": ("awq", lambda t: t.pop(f"{K}.scales"), "has no scales beside it"),
    "another layout": (
        "awq",
        lambda t: t.update({f"{K}.qweight": t[f"{K}.qweight"].t().contiguous()}),
        "has scales of",
    ),
    "a part of floats": (
        "gptq",
        lambda t: t.update({f"{K}.qzeros": t[f"{K}.scales"].clone()}),
        "has a qzeros stored as F16",
    ),
    "no scale": ("fp8", lambda t: t.pop(f"{K}.weight_scale_inv"), "is stored as F8_E4M3"),
    "scales of others": ("fp8", lambda t: t.update({f"{K}.weight_scale_inv": torch.ones(3, 3)}), "has scales of shape"),
    "another matrix": (
        "nf4",
        lambda t: t.update({f"{K}.weight": torch.zeros(8, 1, dtype=torch.uint8)}),
        "doesn't hold two values a byte",
    ),
    "another's shape": (
        "gptq",
        lambda t: t.update(
            {f"{K}.{e}": t[f"model.layers.0.self_attn.q_proj.{e}"].clone() for e in ("qweight", "qzeros", "scales")}
        ),
        "has shape [128, 128], but config.json asks for [64, 128]",
    ),
    "a bias that is none": (
        "gptq",
        lambda t: t.update({"model.layers.0.self_attn.o_proj.bias": torch.ones(128)}),
        "tensors that config.json has no place for: model.layers.0.self_attn.o_proj.bias",
    ),
}


@pytest.mark.parametrize(("made", "change", "said"), DAMAGED.values(), ids=DAMAGED, indirect=["made"])
def test_tensors_that_make_no_matrix_are_named(made, change, said):
    problem = damaged(made, change)
    assert said in problem and "; " in problem


@pytest.mark.parametrize("made", ["gptq desc_act"], indirect=True)
def test_groups_that_are_not_there_are_found_when_the_weights_are_read(made):
    file = made / "quantised" / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{K}.g_idx"][5] = 99
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"can't be dequantised .numbers groups up to 99, and has scales of 4"):
        states(made / "quantised")


def test_plain_weights_that_claim_to_be_quantised(source, tmp_path):
    own = shutil.copytree(source, tmp_path / "own")
    config = json.loads((own / "config.json").read_text()) | {"quantization_config": AWQ}
    (own / "config.json").write_text(json.dumps(config))
    (problem,) = check_checkpoint(str(own)).problems
    assert "quantised by AWQ, but none of the language half is stored so" in problem
    assert not check_checkpoint(str(own), needs=Half.VISION).problems


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
def test_bitsandbytes_own_tensors(source, tmp_path, kind, nested):
    functional = pytest.importorskip("bitsandbytes").functional

    def quantise(weight):
        stored, state = functional.quantize_4bit(weight.bfloat16(), quant_type=kind, compress_statistics=nested)
        values = functional.dequantize_4bit(stored, state).float()
        return {"weight": stored} | {f"weight.{name}": x for name, x in state.as_dict(packed=True).items()}, values

    made = q.quantised(source, tmp_path / "made", quantise, BNB)
    plain = states(made / "plain")
    assert all(torch.equal(tensor, plain[name]) for name, tensor in states(made / "quantised").items())


@pytest.mark.parametrize("name", ["awq", "gptq with spare biases"])
def test_a_family_of_the_general_path(tmp_path, name):
    """Its names are those of its transformers class, which has none for packed tensors; its check at start passes."""
    path = make("llava", tmp_path / "llava")
    pattern = r"language_model\.model\.layers\..*_proj\.weight"
    made = q.quantised(path, tmp_path / "made", *FORMATS[name], also=pattern)
    if name != "awq":
        file = made / "quantised" / "model.safetensors"
        bias = {"language_model.model.layers.0.self_attn.o_proj.bias": torch.zeros(64)}
        save_file(load_file(file) | bias, file)
    lora = adapter(tmp_path / "lora", {"model.language_model.layers.0.self_attn.q_proj": (64, 64)})
    states = []
    for kind, source in (("quantised", str(lora)), ("plain", str(lora)), ("plain", None)):
        checkpoint = open_checked(str(made / kind), Half.LANGUAGE, adapter=source)
        model = checkpoint.family.load_text(checkpoint, torch.float32, lambda name: CPU, [CPU] * 3)
        states.append(model._decoder.state_dict())
    ours, plain, without = states
    assert all(torch.equal(ours[name], tensor) for name, tensor in plain.items())
    changed = {name for name, tensor in plain.items() if not torch.equal(tensor, without[name])}
    assert changed == {"layers.0.self_attn.q_proj.weight"}
