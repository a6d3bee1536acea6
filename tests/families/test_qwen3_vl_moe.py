"""Qwen3-VL with a mixture of experts: answers as the unsplit model's, its stacks as either way stored, its sizes."""

from __future__ import annotations

import asyncio
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from lm_service.app import load as load_language
from lm_service.settings import LanguageSettings
from lookonce.models.checkpoint import Half, open_checkpoint
from lookonce.models.checkpoint.check import check_checkpoint
from lookonce.models.family import Dimensions
from lookonce.models.qwen2_vl import modules
from lookonce.models.qwen2_vl.architecture import tensor_shapes
from lookonce.models.qwen2_vl.modules import load_language_model
from lookonce.models.qwen3_vl.architecture import MOE_SIZES
from lookonce.models.qwen3_vl.config import MOE_FAMILY
from lookonce.models.qwen3_vl.modules import RoutedTextModel
from lookonce.models.qwen3_vl.synthetic import make_random_checkpoint
from lookonce.models.self_check import SelfCheckFailed
from lookonce.models.sizing import size_of
from tests.cli.commands import invoke
from tests.engine.lab import ask, generation
from tests.families.models_page import No, Served
from tests.families.test_qwen3_vl import (
    CHOICES,
    CONVERSATIONS,
    MAX_PIXELS,
    OUTER,
    PREPROCESSOR,
    QUESTION,
    SPREAD,
    TEXT,
    VISION,
    canonical,
    distance,
    engine_over,
    with_images,
)
from tests.images import photograph, save
from tests.system.cluster import System
from tests.unsplit import Unsplit

SERVED = Served(
    "Qwen3-VL 30B-A3B, 235B-A22B",
    "qwen3_vl_moe",
    split="test_the_services_answer_as_the_unsplit_model",
    packed="test_packed_answers_are_the_unsplit_models",
    prefix="test_the_services_answer_as_the_unsplit_model",
    scores="test_the_services_answer_as_the_unsplit_model",
    video=No("families/test_models_page.py::test_video_is_no_part_of_a_chat"),
    quantised="test_int8_experts_are_near_the_exact_ones",
)
ROUTING = {
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "model_type": "qwen3_vl_moe_text",
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
}
PUBLISHED = {  # hidden, ffn, heads, layers, width of an expert
    "30B-A3B": (2048, 6144, 32, 48, 768),
    "235B-A22B": (4096, 12288, 64, 94, 1536),
}
COUNTED = {"30B-A3B": 31_070_754_032, "235B-A22B": 235_670_022_896}


def published(name):
    """config.json of Qwen3-VL-`name`-Instruct."""
    hidden, ffn, heads, layers, width = PUBLISHED[name]
    text = {"hidden_size": hidden, "intermediate_size": ffn, "num_attention_heads": heads, "num_hidden_layers": layers}
    vision = VISION | {"out_hidden_size": hidden, "model_type": "qwen3_vl_moe"}
    outer = OUTER | {"model_type": "qwen3_vl_moe", "architectures": ["Qwen3VLMoeForConditionalGeneration"]}
    text = TEXT | ROUTING | text | {"moe_intermediate_size": width}
    return outer | {"tie_word_embeddings": False, "text_config": text, "vision_config": vision}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny model, 2 of 8 experts a token."""
    path = tmp_path_factory.mktemp("experts") / "model"
    return make_random_checkpoint(path, size="moe-tiny", tied=False, max_pixels=MAX_PIXELS)


@pytest.fixture(scope="module")
def unsplit(checkpoint):
    return Unsplit(checkpoint, system=None)


def turned(checkpoint, directory):
    """The same model as transformers 5 saves it: stacks the other way round, and one setting's other name."""
    path = shutil.copytree(checkpoint, directory)
    tensors = load_file(path / "model.safetensors")
    tensors = {name: x.mT.contiguous() if ".experts." in name else x for name, x in tensors.items()}
    save_file(tensors, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["num_local_experts"] = config["text_config"].pop("num_experts")
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"step_tokens": 7, "burst_tokens": 7},
        pytest.param({"native": False}, marks=pytest.mark.slow),
        pytest.param({"home": SPREAD, "step_tokens": 24}, marks=pytest.mark.slow),
    ],
    ids=["all at once", "chunks", "torch", "three devices"],
)
async def test_packed_answers_are_the_unsplit_models(checkpoint, unsplit, how):
    """Of several conversations with images and their deepstacks together: each token meets its own experts."""
    async with engine_over(checkpoint, **how) as (engine, prompts):
        made = await asyncio.gather(*(ask(engine, generation(prompt, 10)) for prompt in prompts))
    unsplit.processor.size = {"shortest_edge": 3136, "longest_edge": MAX_PIXELS}
    for turns, (told,) in zip(map(with_images, CONVERSATIONS), made, strict=True):
        assert told.tokens == unsplit.answer_ids(turns, 10)
        for item, row in zip(told.logprobs, unsplit.told(turns, told.tokens), strict=True):
            found = torch.tensor([logprob for _, logprob in sorted(item.top)])
            torch.testing.assert_close(found, row[[token for token, _ in sorted(item.top)]], atol=2e-4, rtol=0)


async def test_int8_experts_are_near_the_exact_ones(checkpoint):
    async with engine_over(checkpoint) as (engine, prompts):
        right = [(await ask(engine, generation(prompt, 1)))[0] for prompt in prompts]
    async with engine_over(checkpoint, quantization="int8") as (engine, prompts):
        for prompt, exact in zip(prompts, right, strict=True):
            assert 1e-4 < distance((await ask(engine, generation(prompt, 1)))[0], exact) < 0.4


def test_stacks_are_one_model_either_way_round(checkpoint, unsplit, tmp_path):
    """As published, and as transformers saves them; loaded they are transformers' own parameters."""
    states = []
    for path in (checkpoint, turned(checkpoint, tmp_path / "turned")):
        assert check_checkpoint(str(path)).problems == ()
        model, _ = load_language_model(open_checkpoint(str(path)), torch.float32, kind=RoutedTextModel)
        states.append(model.state_dict())
    expected = unsplit.model.model.language_model.state_dict()
    for state in states:
        assert state.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


def load_checked(path, **settings):
    return load_language(LanguageSettings(model=str(path), device="cpu", **settings))


def test_a_stack_of_another_model_is_refused(checkpoint, tmp_path):
    path = turned(checkpoint, tmp_path / "turned")
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["moe_intermediate_size"] = 40
    (path / "config.json").write_text(json.dumps(config))
    (problem,) = check_checkpoint(str(path)).problems
    assert "has shape [8, 64, 48], but config.json asks for [8, 40, 64] (7 more differ)" in problem


def two_experts_swapped(mlp):
    stack = mlp.experts.down_proj
    stack.data = stack.data[[1, 0, *range(2, len(stack))]]


def a_stack_the_wrong_way_round(mlp):
    stack = mlp.experts.gate_up_proj
    stack.data = stack.data.mT.reshape(stack.shape)


def routers_rows_rolled(mlp):
    mlp.gate.weight.data = mlp.gate.weight.data.roll(1, 0)


@pytest.mark.parametrize("fault", [two_experts_swapped, a_stack_the_wrong_way_round, routers_rows_rolled])
def test_a_fault_of_the_experts_keeps_the_service_from_serving(checkpoint, monkeypatch, fault):
    load = modules.load_language_model

    def spoilt(*args, **named):
        loaded = load(*args, **named)
        fault(loaded[0].layers[2].mlp)
        return loaded

    load_checked(checkpoint)
    monkeypatch.setattr(modules, "load_language_model", spoilt)
    with pytest.raises(SelfCheckFailed, match="language half failed: log-probabilities"):
        load_checked(checkpoint)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sound_half_passes_as_either_is_stored(checkpoint, tmp_path, dtype):
    for path in (checkpoint, turned(checkpoint, tmp_path / "turned")):
        assert load_checked(path, dtype=dtype).engine is not None


@pytest.mark.slow
def test_the_services_answer_as_the_unsplit_model(checkpoint, unsplit, tmp_path):
    """One encode of an image, whose prefix further questions and scores are computed behind."""
    done = invoke("split", checkpoint, tmp_path / "halves")
    assert done.returncode == 0, done.stderr
    file = save(photograph("coffee", (150, 250)), "PNG")
    questions = [QUESTION, *(f"Is this number {number}?" for number in range(7))]
    unsplit.processor.size = {"shortest_edge": 3136, "longest_edge": MAX_PIXELS}
    with System(tmp_path / "halves", tmp_path / "store") as system:
        image = system.upload(file)["id"]
        *written, scored = system.ask(
            image, [*questions, {"text": "Well?", "choices": CHOICES}], max_tokens=8, temperature=0
        )
        (again,) = system.ask(image, ["And why?"], max_tokens=4, temperature=0)
        assert system.encodes() == 1 and again["receipt"]["prefix"] == "hit"
    for told, question in zip(written, questions, strict=True):
        assert told["text"] == unsplit.answer([("user", [canonical(file), question])], 8)
    expected = unsplit.weighed([("user", [canonical(file), "Well?"])], CHOICES)
    assert scored["choices"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_served_and_counted_as_transformers_builds_it(name):
    config, preprocessor = published(name), MOE_FAMILY.preprocessor(PREPROCESSOR)
    assert MOE_FAMILY.problems(config, preprocessor, Half) == []
    counted = size_of(MOE_FAMILY, config, preprocessor)
    with torch.device("meta"):
        model = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig.from_dict(config))
    tower = sum(parameter.numel() for parameter in model.model.visual.parameters())
    assert counted.halves[Half.VISION].parameters == tower
    assert counted.halves[Half.LANGUAGE].parameters == model.num_parameters() - tower
    assert model.num_parameters() == COUNTED[name]
    arch = MOE_SIZES[name.lower()]
    assert MOE_FAMILY.architecture(config) == arch and not counted.tied
    names = tensor_shapes(arch, tied=False)
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert names.keys() == own.keys()
    for tensor, shape in names.items():
        assert own[tensor] == ((shape[0], shape[2], shape[1]) if ".experts." in tensor else shape)
    hidden, _, _, layers, width = PUBLISHED[name]
    of_a_token = 3 * layers * 8 * hidden * width + sum(
        math.prod(shape) for tensor, shape in names.items() if ".layers." in tensor and len(shape) == 2
    )
    dimensions: Dimensions = counted.dimensions
    assert counted.halves[Half.LANGUAGE].matrix_parameters - dimensions.idle_parameters == of_a_token
    assert dimensions.ffn == 8 * width and dimensions.deepstack == 3


def test_plan_counts_every_expert(tmp_path):
    model = tmp_path / "30B"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(published("30B-A3B")))
    (model / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    done = invoke("plan", "--model", model, "--gpus", "80,80")
    assert done.returncode == 0, done.stderr
    halves = size_of(MOE_FAMILY, published("30B-A3B"), MOE_FAMILY.preprocessor(PREPROCESSOR)).halves
    for half in Half:
        assert f"{halves[half].parameters:,} parameters" in done.stdout
    assert 30.5e9 < halves[Half.LANGUAGE].parameters < 30.6e9
    small = halves[Half.LANGUAGE].weight_bytes("bfloat16", int8=True) / halves[Half.LANGUAGE].weight_bytes("bfloat16")
    assert 0.5 < small < 0.53


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ({"num_experts": None}, "config.json: num_experts must be a whole number above 0, got None"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 must be at most num_experts 8"),
        ({"mlp_only_layers": [0]}, "layers without experts (mlp_only_layers, decoder_sparse_step) are not supported"),
        ({"decoder_sparse_step": 2}, "layers without experts (mlp_only_layers, decoder_sparse_step) are not supported"),
    ],
)
def test_what_cannot_be_computed_is_said_before_anything_is_loaded(checkpoint, tmp_path, text, said):
    path = shutil.copytree(checkpoint, tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    config["text_config"] |= text
    (path / "config.json").write_text(json.dumps(config))
    problems = check_checkpoint(str(path)).problems
    assert any(said in problem for problem in problems), problems
