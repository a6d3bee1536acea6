"""Random checkpoints: a tokenizer, chat template and config that agree, and answers that depend on the image."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GenerationConfig, Qwen2VLForConditionalGeneration

from lookonce.core.errors import CheckpointError
from lookonce.models.checkpoint import Half, open_checkpoint
from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint

TEXT = "Is the café open at 17:45?\n\n  It's 3 o'clock — 東京 🙂"


@pytest.mark.parametrize("fixture", ["tiny", "sharded"])
def test_tokenizer_ids_agree_with_config_and_text_survives(fixture, request):
    path = request.getfixturevalue(fixture)
    config = json.loads((path / "config.json").read_text())
    raw, loaded = Tokenizer.from_file(str(path / "tokenizer.json")), AutoTokenizer.from_pretrained(path)
    assert loaded(TEXT).input_ids == raw.encode(TEXT).ids
    assert loaded.decode(raw.encode(TEXT).ids) == TEXT
    for key, token in [
        ("image_token_id", "<|image_pad|>"),
        ("video_token_id", "<|video_pad|>"),
        ("vision_start_token_id", "<|vision_start|>"),
        ("vision_end_token_id", "<|vision_end|>"),
    ]:
        assert config[key] == raw.token_to_id(token)
        assert raw.encode(token).ids == [config[key]]
    vocab = config.get("text_config", config)["vocab_size"]
    assert raw.get_vocab_size() == vocab
    assert sorted(raw.get_vocab().values()) == list(range(vocab))
    assert loaded.eos_token_id == raw.token_to_id("<|im_end|>")
    assert GenerationConfig.from_pretrained(path).eos_token_id == [loaded.eos_token_id, loaded.pad_token_id]


def test_chat_template_has_the_semantics_of_qwen2_vl(sharded):
    tokenizer = AutoTokenizer.from_pretrained(sharded)
    parts = [{"type": "image"}, {"type": "text", "text": "What\n is it?"}, {"type": "image_url", "image_url": "x"}]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A cat."}]
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    body = f"<|im_start|>user\n{image}What\n is it?{image}<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
    default = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert tokenizer.apply_chat_template(chat, tokenize=False) == default + body
    own = [{"role": "system", "content": "Be brief."}, *chat]
    rendered = tokenizer.apply_chat_template(own, tokenize=False, add_generation_prompt=True)
    assert rendered == f"<|im_start|>system\nBe brief.<|im_end|>\n{body}<|im_start|>assistant\n"


@pytest.mark.parametrize("tied", [True, False])
def test_greedy_text_depends_on_the_image_and_does_not_get_stuck(tmp_path, tied):
    path = make_random_checkpoint(tmp_path / "model", size="small", tied=tied)
    model = Qwen2VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    grid = torch.tensor([[1, 8, 8]])
    ids = torch.tensor([[9, model.config.vision_start_token_id, *[model.config.image_token_id] * 16, 70, 71]])
    marks = (ids == model.config.image_token_id).int()
    answers = []
    for seed in range(2):
        pixels = torch.randn(64, 1176, generator=torch.Generator().manual_seed(seed))
        inputs = {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": marks}
        with torch.inference_mode():
            likeliest = model(**inputs).logits.softmax(-1).max(-1).values
            answer = model.generate(**inputs, min_new_tokens=24, max_new_tokens=24, do_sample=False)[0, -24:]
        assert likeliest.median() < 0.6
        assert len(set(answer.tolist())) >= 4
        answers.append(answer)
    assert (answers[0] != answers[1]).sum() >= 12


def test_weights_are_finite_and_biases_are_not_zero(tiny):
    from tests.modules import load_vision_tower

    for name, value in load_vision_tower(open_checkpoint(str(tiny)), torch.float32).named_parameters():
        assert torch.isfinite(value).all() and value.std() > 0, name
        if "norm" in name and name.endswith("weight"):
            assert abs(value.mean() - 1) < 0.05


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"size": "huge"}, "size must be one of tiny"),
        ({"layout": "flat"}, "layout must be published or nested"),
        ({"dtype": "int8"}, "dtype must be one of float32"),
        ({"shards": 0}, "shards must be between 1 and"),
        ({"shards": 10_000}, "shards must be between 1 and"),
        ({"depth": 3}, "unknown dimension depth; known: vision_depth"),
        ({"heads": 3}, "don't divide"),
        ({"heads": 64, "kv_heads": 2}, "head width 1 must be even"),
        ({"vision_heads": 32}, "multiple of 4"),
        ({"vocab": 100}, "vocab must be at least 270"),
    ],
)
def test_arguments_that_cannot_be(tmp_path, arguments, match):
    with pytest.raises(CheckpointError, match=match):
        make_random_checkpoint(tmp_path / "model", **arguments)


def test_a_checkpoint_is_never_overwritten(tiny):
    with pytest.raises(CheckpointError, match="already holds a checkpoint"):
        make_random_checkpoint(tiny)


def test_from_the_command_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "lookonce.models.qwen2_vl.synthetic",
        str(tmp_path / "made"),
        "--untied",
        "--shards",
        "2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, str(tmp_path / "made"), "")
    assert len(open_checkpoint(str(tmp_path / "made")).files(Half.LANGUAGE)) >= 1
    again = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert again.returncode == 2 and "already holds a checkpoint" in again.stderr
