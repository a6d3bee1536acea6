"""What the check of a checkpoint passes starts; what can't start is refused by commands and services in its words."""

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from lm_service.app import load as load_language
from lm_service.prompt import load_template
from lm_service.settings import LanguageSettings
from lookonce.core.errors import CheckpointError
from lookonce.models.chat.chat_format import Turn
from lookonce.models.checkpoint import Half
from lookonce.models.checkpoint.check import check_checkpoint
from lookonce.models.checkpoint.split import split_checkpoint
from lookonce.models.qwen2_vl.config import FAMILY
from lookonce.models.qwen2_vl.synthetic_tokenizer import CHAT_TEMPLATE
from tests.cli.commands import invoke, lookonce
from tests.processes import ServiceProcess
from vision_service.app import load
from vision_service.settings import VisionSettings

MARKER = "<|vision_start|><|image_pad|><|vision_end|>"
STRINGS_ONLY = """\
{%- for message in messages -%}
{{- '<|im_start|>' ~ message['role'] ~ '\\n' ~ message['content'] ~ '<|im_end|>\\n' -}}
{%- endfor -%}
{{- '<|im_start|>assistant\\n' -}}
"""
CONCATENATES = STRINGS_ONLY.replace(" ~ ", " + ")


@pytest.fixture
def own(tiny, tmp_path) -> Path:
    return shutil.copytree(tiny, tmp_path / "own")


def edit(name, path, *, drop=(), **changes):
    file = path / name
    value = (json.loads(file.read_text()) if file.is_file() else {}) | changes
    file.write_text(json.dumps({key: entry for key, entry in value.items() if key not in drop}))


def tensors(change, path):
    file = path / "model.safetensors"
    values = load_file(file)
    change(values)
    save_file(values, file)


def quantise(endings, values):
    for name in [name for name in values if name.endswith("_proj.weight") and name.startswith("model.")]:
        del values[name]
        values |= {name.removesuffix(".weight") + ending: np.zeros(4, np.int32) for ending in endings}


def template(text, path):
    edit("tokenizer_config.json", path, chat_template=text)


def larger_tokenizer(path):
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save(str(path / "tokenizer.json"))


def index_beside(path):
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"visual.patch_embed.proj.weight": "model-00001-of-00001.safetensors"}})
    )
    shutil.copy(path / "model.safetensors", path / "model-00001-of-00001.safetensors")


def vision(path, **changes):
    config = json.loads((path / "config.json").read_text())
    edit("config.json", path, vision_config=config["vision_config"] | changes)


BOTH, VISION, LANGUAGE = set(Half), {Half.VISION}, {Half.LANGUAGE}
config, preprocessor = partial(partial, edit, "config.json"), partial(partial, edit, "preprocessor_config.json")
SPOILED = {  # what is done to a good checkpoint, the halves that can't start, and what is said
    "quantised": (
        config(quantization_config={"quant_method": "aqlm"}),
        BOTH,
        "quantization_config: weights quantised by aqlm are not supported",
    ),
    "gptq": (partial(tensors, partial(quantise, (".qweight", ".scales", ".g_idx"))), LANGUAGE, "quantised by GPTQ"),
    "awq": (partial(tensors, partial(quantise, (".qweight", ".qzeros", ".scales"))), LANGUAGE, "quantised by AWQ"),
    "bnb": (partial(tensors, partial(quantise, (".weight", ".absmax"))), LANGUAGE, "quantised by bitsandbytes"),
    "fp8": (partial(tensors, partial(quantise, (".weight", ".weight_scale_inv"))), LANGUAGE, "quantised by FP8"),
    "packed": (partial(tensors, partial(quantise, (".weight_packed",))), LANGUAGE, "quantised by compressed-tensors"),
    "integers": (
        partial(tensors, lambda t: t.update({"model.norm.weight": np.zeros(64, np.int8)})),
        LANGUAGE,
        "'model.norm.weight' is stored as I8; supported: F64",
    ),
    "shape": (
        partial(tensors, lambda t: t.update({"visual.merger.mlp.2.bias": np.zeros(65, np.float32)})),
        VISION,
        "has shape [65], but config.json asks for [64]",
    ),
    "missing": (
        partial(tensors, lambda t: t.pop("model.norm.weight")),
        LANGUAGE,
        "missing from the weights: model.norm",
    ),
    "no head": (config(tie_word_embeddings=False), LANGUAGE, "lm_head.weight, the output head"),
    "reward head": (
        partial(tensors, lambda t: t.update({"score.weight": np.zeros(1, np.float32)})),
        BOTH,
        "belong to no layout of the model: score.weight: a head of another kind",
    ),
    "adapter": (
        partial(tensors, lambda t: t.update({"base_model.model.x.lora_A.weight": np.zeros(1, np.float32)})),
        BOTH,
        "tensors of a LoRA adapter",
    ),
    "architectures": (config(architectures=["Qwen2VLForReward"]), BOTH, "architectures is Qwen2VLForReward"),
    "dynamic": (
        config(rope_scaling={"type": "dynamic", "factor": 4.0, "mrope_section": [2, 3, 3]}),
        LANGUAGE,
        "rope_scaling: rope type 'dynamic' is not supported",
    ),
    "yarn": (
        config(rope_scaling={"type": "yarn", "factor": "4", "mrope_section": [2, 3, 3]}),
        LANGUAGE,
        "rope_scaling: factor must be a number from 1 on, got '4'",
    ),
    "sections": (
        config(rope_scaling={"type": "mrope", "mrope_section": [1, 1]}),
        LANGUAGE,
        "mrope_section must be three",
    ),
    "window": (config(use_sliding_window=True), LANGUAGE, "use_sliding_window: sliding-window attention is not"),
    "layer types": (
        config(layer_types=["full_attention", "sliding_attention"]),
        LANGUAGE,
        "layer_types: sliding-window",
    ),
    "activation": (partial(vision, hidden_act="gelu"), VISION, "hidden_act 'gelu' is not supported"),
    "widths": (config(hidden_size=128), BOTH, "vision_config.hidden_size 64 differs from the language model's 128"),
    "patches": (
        preprocessor(patch_size=16),
        VISION,
        "patch_size 16 differs from config.json's vision_config.patch_size 14",
    ),
    "resize": (preprocessor(do_resize=False), VISION, "do_resize false is not supported"),
    "both forms": (index_beside, BOTH, "holds both model.safetensors and model.safetensors.index.json"),
    "no tokenizer": (lambda path: (path / "tokenizer.json").unlink(), LANGUAGE, "the tokenizer is missing"),
    "a torn tokenizer": (
        lambda path: (path / "tokenizer.json").write_text("{"),
        LANGUAGE,
        "tokenizer.json: no tokenizer",
    ),
    "a larger tokenizer": (larger_tokenizer, LANGUAGE, "'<extra>' has id 512, vocab_size is 512"),
    "placeholder": (config(image_token_id=5), LANGUAGE, "image_token_id 5 is no special token"),
    "no template": (partial(edit, "tokenizer_config.json", drop=("chat_template",)), LANGUAGE, "has no chat template"),
    "other templates": (
        partial(template, [{"name": "tool_use", "template": CHAT_TEMPLATE}]),
        LANGUAGE,
        "chat_template lists tool_use, and none is named 'default'",
    ),
    "a broken template": (partial(template, "{% for x %}"), LANGUAGE, "can't be rendered for a user's message"),
    "a blind template": (
        partial(template, CHAT_TEMPLATE.replace("<|image_pad|>", "")),
        LANGUAGE,
        "writes 0 placeholders (<|image_pad|>) for one image",
    ),
    "two placeholders": (
        partial(template, CHAT_TEMPLATE.replace("<|image_pad|>", "<|image_pad|>" * 2)),
        LANGUAGE,
        "writes 2",
    ),
    "end": (
        partial(edit, "generation_config.json", eos_token_id="x"),
        LANGUAGE,
        "eos_token_id must be the id of a token",
    ),
}


def old_tokenizer(path):
    """As repositories of 2024 have it: vocabulary, merges, and added tokens in tokenizer_config.json alone."""
    model = json.loads((path / "tokenizer.json").read_text())["model"]
    (path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (path / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, model["merges"])]) + "\n")
    (path / "tokenizer.json").unlink()


def index_of_the_single_file(path):
    names = load_file(path / "model.safetensors")
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")})
    )


GOOD = {
    "as it is": lambda path: None,
    "a list of templates": partial(
        template, [{"name": "tool_use", "template": "{{ x() }}"}, {"name": "default", "template": CHAT_TEMPLATE}]
    ),
    "vocabulary and merges": old_tokenizer,
    "an index that names the single file": index_of_the_single_file,
    "a template of strings": partial(template, STRINGS_ONLY),
    "no generation_config": lambda path: (path / "generation_config.json").unlink(),
    "no architectures": config(architectures=None),
    "an embedding model's class": config(architectures=["GmeQwen2VL"]),
}


def loads(half, path):
    if half is Half.VISION:
        return load(VisionSettings(model=str(path), kernels="torch"))
    return load_language(LanguageSettings(model=str(path), kernels="torch"))


@pytest.mark.parametrize("name", SPOILED)
def test_what_is_spoiled_is_refused_by_all_in_the_same_words(own, tmp_path, name):
    spoil, halves, said = SPOILED[name]
    spoil(own)
    for half in Half:
        found = check_checkpoint(str(own), needs=half)
        if half not in halves:
            assert not found.problems and loads(half, own)
            continue
        with pytest.raises(CheckpointError) as refused:
            loads(half, own)
        assert refused.value.problems == found.problems
    problems = check_checkpoint(str(own)).problems
    assert any(said in problem for problem in problems)
    message = CheckpointError(*problems).message
    commands = [("split", own, tmp_path / "out"), ("plan", "--model", own, "--ram", "1")]
    commands += [("up", "--model", own, "--data-dir", tmp_path / "data", "--port", "0")]
    for command in commands:
        done = invoke(*command)
        assert (done.returncode, done.stderr.strip()) == (1, f"lookonce: error: {message}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", GOOD)
def test_what_is_passed_starts(own, tmp_path, name):
    GOOD[name](own)
    assert set(check_checkpoint(str(own)).usable()) == set(Half)
    assert all(loads(half, own) for half in Half)
    split_checkpoint(str(own), tmp_path / "halves")
    assert set(check_checkpoint(str(tmp_path / "halves")).usable()) == set(Half)


def test_all_problems_are_said_at_once_by_every_command_and_service(own, tmp_path):
    for name in ("yarn", "window", "shape", "missing", "no tokenizer", "resize"):
        SPOILED[name][0](own)
    problems = check_checkpoint(str(own)).problems
    assert len(problems) == 6
    doctor = lookonce("doctor", "--model", own, "--data-dir", tmp_path / "data", "--port", "0", "--json")
    found = [finding for finding in json.loads(doctor.stdout) if finding["check"] == "checkpoint"]
    assert doctor.returncode == 1
    assert [f"{finding['detail']}; {finding['remedy']}" for finding in found] == list(problems)
    up = invoke("up", "--model", own, "--data-dir", tmp_path / "data", "--port", "0")
    assert all(f"\n  - {problem}\n" in up.stderr for problem in problems)
    for module, half in (("vision_service", Half.VISION), ("lm_service", Half.LANGUAGE)):
        process = ServiceProcess(module, "--model", str(own))
        try:
            assert process.wait_exit() != 0
            assert all(
                json.dumps(problem)[1:-1] in process.log for problem in check_checkpoint(str(own), needs=half).problems
            )
        finally:
            process.close()


def test_the_check_loads_no_torch(own):
    code = "import sys; from lookonce.models.checkpoint.check import check_checkpoint as check\n"
    code += "print(check(sys.argv[1]).problems, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(own)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "() False"


@pytest.mark.parametrize("spoil", [old_tokenizer, GOOD["a list of templates"]])
def test_old_forms_give_the_ids_of_the_unsplit_tokenizer(tiny, own, spoil):
    spoil(own)
    whole, ours = AutoTokenizer.from_pretrained(tiny), load_template(own, FAMILY)
    turns = [Turn("user", (None, "It's 12 猫 — what?\n\n  Well ")), Turn("assistant", ("A cat.",))]
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": turns[0].parts[1]}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ]
    text = whole.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.ids(turns) == whole(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", [STRINGS_ONLY, CONCATENATES])
def test_a_template_of_strings_is_given_strings(tiny, own, text):
    template(text, own)
    whole, ours = AutoTokenizer.from_pretrained(tiny), load_template(own, FAMILY, MARKER)
    ids = ours.ids([Turn("system", ("Be ", "brief.")), Turn("user", (None, "What is <|im_end|>?"))])
    assert whole.decode(ids) == (
        f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{MARKER}What is <|im_end|>?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert ids.count(whole.convert_tokens_to_ids("<|im_end|>")) == 2
    assert ids.count(whole.convert_tokens_to_ids("<|image_pad|>")) == 1


def test_each_role_is_given_the_form_that_the_template_takes(tiny, own):
    """Lists for users, strings for others, as many fine-tunes' templates have it."""
    strings = "{%- if message['role'] != 'user' -%}{{- message['content'] -}}{%- elif message['content'] is string -%}"
    template(CHAT_TEMPLATE.replace("{%- if message['content'] is string -%}", strings), own)
    turns = [Turn("system", ("Be brief.",)), Turn("user", (None, "Hm?")), Turn("assistant", ("Yes.",))]
    assert load_template(own, FAMILY).ids(turns) == load_template(tiny, FAMILY).ids(turns)
