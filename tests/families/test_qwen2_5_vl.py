"""Qwen2.5-VL: its tower is transformers' own, and its halves answer as the unsplit model does, through every door."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.vision_utils import get_vision_window_index

from lookonce.core.errors import CheckpointError
from lookonce.models.checkpoint import Half, open_checkpoint
from lookonce.models.checkpoint.check import check_checkpoint
from lookonce.models.qwen2_5_vl.architecture import SIZES
from lookonce.models.qwen2_5_vl.config import FAMILY
from lookonce.models.qwen2_5_vl.synthetic import make_random_checkpoint
from lookonce.models.qwen2_5_vl.vision import WindowEncoder
from lookonce.models.qwen2_5_vl.windows import windows_of
from lookonce.models.qwen2_vl.architecture import model_config, tensor_shapes
from lookonce.models.sizing import size_of
from tests.cli.commands import invoke
from tests.families.models_page import No, Served
from tests.images import odd_files, photograph, save
from tests.system.cluster import System, data_url, image_part, text_part
from tests.unsplit import Unsplit
from vision_service.images import Decoder, ImageLimits

CPU = torch.device("cpu")
SIDES = [(57, 200), (56, 56), (300, 200), (29, 31), (200, 300), (448, 336), (1000, 57), (224, 112)]
"""Of images; a window is 112 pixels wide."""
BOUNDS = 3136, 200_000
LAYOUTS = {"published": {"layout": "published", "tied": True}, "nested": {"layout": "nested", "tied": False}}
SERVED = Served(
    "Qwen2.5-VL 3B, 7B, 32B, 72B",
    "qwen2_5_vl",
    split="test_one_image_of_every_kind",
    packed="test_questions_at_once_are_answered_as_alone",
    prefix="test_one_image_of_every_kind",
    scores="test_choices_are_weighed_as_by_the_unsplit_model",
    video=No("families/test_models_page.py::test_video_is_no_part_of_a_chat"),
    quantised="test_halves_in_int8_answer_together",
)
QUESTION, CHOICES = "What is on it?", ["yes", "no", "a cat"]

VISION = {
    "depth": 32,
    "hidden_act": "silu",
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_chans": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
    "temporal_patch_size": 2,
}
TEXT = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 128000,
    "model_type": "qwen2_5_vl",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_sliding_window": False,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}
PUBLISHED = {
    "3B": (2048, 11008, 16, 36, 2, 151936, True, 3420),
    "7B": (3584, 18944, 28, 28, 4, 152064, False, 3420),
    "32B": (5120, 27648, 40, 64, 8, 152064, False, 3456),
    "72B": (8192, 29568, 64, 80, 8, 152064, False, 3456),
}


def published(name):
    """config.json of Qwen2.5-VL-`name`-Instruct."""
    hidden, ffn, heads, layers, kv_heads, vocabulary, tied, vision_ffn = PUBLISHED[name]
    return TEXT | {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "vision_config": VISION | {"out_hidden_size": hidden, "intermediate_size": vision_ffn},
    }


def write_settings(directory, config):
    """A checkpoint without weights."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    preprocessor = {"min_pixels": 3136, "max_pixels": 12845056, "image_processor_type": "Qwen2VLImageProcessor"}
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return directory


@pytest.fixture(scope="module")
def noisy():
    """Images of SIDES."""
    return [photograph("astronaut" if at % 2 else "coffee", size) for at, size in enumerate(SIDES)]


@pytest.fixture(scope="module", params=LAYOUTS)
def checkpoint(request, tmp_path_factory):
    """A tiny model under both kinds of names."""
    return make_random_checkpoint(tmp_path_factory.mktemp(request.param) / "model", **LAYOUTS[request.param])


def encoder(path, dtype=torch.float32, **options):
    return WindowEncoder.load(open_checkpoint(str(path), needs=Half.VISION), dtype, CPU, **options)


def encoded(encoder, images):
    return encoder.encode([encoder.prepare(image, *BOUNDS) for image in images])


@pytest.mark.parametrize("native", [True, False])
def test_the_tower_is_that_of_transformers(checkpoint, noisy, native):
    tower, unsplit = encoder(checkpoint, native=native), Unsplit(checkpoint)
    unsplit.processor.size = {"shortest_edge": BOUNDS[0], "longest_edge": BOUNDS[1]}
    assert tower.native == native
    for image, rows in zip(noisy, encoded(tower, noisy), strict=True):
        expected = unsplit.features(image)
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(rows, expected, atol=2e-5, rtol=0)
        torch.testing.assert_close(rows, encoded(tower, [image])[0], atol=1e-5, rtol=0)


def test_with_kernels_a_row_of_a_batch_has_the_bits_of_the_row_alone(checkpoint, noisy):
    tower = encoder(checkpoint)
    for image, rows in zip(noisy, encoded(tower, noisy), strict=True):
        assert torch.equal(rows, encoded(tower, [image])[0])


def test_windows_and_whole_images_are_both_seen(checkpoint, noisy, tmp_path):
    """What the tower would be with windows everywhere, or nowhere, is another one."""
    made = encoded(encoder(checkpoint), noisy)
    for number, blocks in enumerate([(), (0, 1, 2)]):
        path = make_random_checkpoint(tmp_path / str(number), full_blocks=blocks)
        for image, rows, other in zip(noisy, made, encoded(encoder(path), noisy), strict=True):
            smaller = max(image.size) <= 112  # than a window
            assert ((rows - other).abs().max() < 1e-4) == smaller


@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (3, 9), (8, 12), (13, 5), (40, 2)])
def test_windows_are_those_of_transformers(shape):
    windows, grid = windows_of(*shape, 4), torch.tensor([[1, 2 * shape[0], 2 * shape[1]]])
    order, ends = get_vision_window_index(grid, spatial_merge_size=2, window_size=112, patch_size=14)
    theirs = {tuple(part.tolist()) for part in order.split((ends.diff() // 4).tolist())}
    ours = torch.from_numpy(windows.order).split(list(windows.counts))
    assert {tuple(part.tolist()) for part in ours} == theirs
    assert (windows.order[windows.back] == range(math.prod(shape))).all()
    assert list(windows.counts) == sorted(windows.counts, reverse=True)


@pytest.mark.parametrize(
    ("dtype", "options", "least", "most"),
    [
        (torch.bfloat16, {}, 0, 0.05),
        (torch.float32, {"quantization": "int8"}, 1e-3, 0.1),
        (torch.float32, {"quantization": "int8", "native": False}, 1e-3, 0.1),
    ],
    ids=str,
)
def test_rounded_towers_are_near_the_exact_one(checkpoint, noisy, dtype, options, least, most):
    tower = encoder(checkpoint, dtype, **options)
    for image, exact, rounded in zip(noisy, encoded(encoder(checkpoint), noisy), encoded(tower, noisy), strict=True):
        assert rounded.dtype is dtype
        assert least < (rounded.float() - exact).norm() / exact.norm() < most
        torch.testing.assert_close(
            encoded(tower, [image])[0], rounded, atol=0.1 if dtype != exact.dtype else 1e-5, rtol=0
        )


@pytest.fixture(scope="module", params=["published", pytest.param("nested", marks=pytest.mark.slow)])
def pair(request, tmp_path_factory):
    """Services on both halves, written by `lookonce split`, and the unsplit model."""
    folder = tmp_path_factory.mktemp("system")
    model = make_random_checkpoint(folder / "model", max_pixels=200 * 28 * 28, **LAYOUTS[request.param])
    done = invoke("split", model, folder / "halves")
    assert done.returncode == 0, done.stderr
    with System(folder / "halves", folder) as system:
        yield system, Unsplit(model)


def canonical(data):
    """The image the model is to see."""
    return Decoder(ImageLimits()).decode(data)


def test_one_image_of_every_kind(pair):
    system, unsplit = pair
    before = system.encodes()
    for name, data in odd_files().items():
        image = system.upload(data)["id"]
        answers = system.ask(image, [QUESTION, "How many are there?"], max_tokens=8, temperature=0)
        for answer, question in zip(answers, [QUESTION, "How many are there?"], strict=True):
            assert answer["text"] == unsplit.answer([("user", [canonical(data), question])], 8), name
    (again,) = system.ask(image, ["And why?"], max_tokens=4, temperature=0)
    assert again["receipt"]["prefix"] == "hit"
    assert system.encodes() - before == len(odd_files())


def test_questions_at_once_are_answered_as_alone(pair):
    """By the unsplit model, which is asked one by one."""
    system, unsplit = pair
    file = save(photograph("coffee", (120, 300)), "PNG")
    questions = [f"What is {'very ' * number}large?" for number in range(8)]
    answers = system.ask(system.upload(file)["id"], questions, max_tokens=6, temperature=0)
    for answer, question in zip(answers, questions, strict=True):
        assert answer["text"] == unsplit.answer([("user", [canonical(file), question])], 6)


def test_three_images_over_several_turns(pair):
    system, unsplit = pair
    files = [save(photograph(name, size), "PNG") for name, size in (("coffee", (90, 120)), ("chelsea", (200, 260)))]
    files.append(odd_files()["29x31"])
    images = [canonical(data) for data in files]
    parts = [image_part(data_url(data)) for data in files]
    messages = [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": [parts[0], text_part("What is in the first?"), parts[1]]},
        {"role": "assistant", "content": "A cup."},
        {"role": "user", "content": [text_part("And here?"), parts[2]]},
    ]
    turns = [
        ("system", ["Answer in one word."]),
        ("user", [images[0], "What is in the first?", images[1]]),
        ("assistant", ["A cup."]),
        ("user", ["And here?", images[2]]),
    ]
    for _ in range(2):  # the second time from every cache
        reply = system.chat(messages, max_tokens=12)
        assert reply["choices"][0]["message"]["content"] == unsplit.answer(turns, 12)


def test_logits_are_those_of_the_unsplit_model(pair):
    """The likeliest twenty of each token of an answer."""
    system, unsplit = pair
    file = save(photograph("chelsea", (300, 200)), "PNG")
    content = [image_part(data_url(file)), text_part(QUESTION)]
    reply = system.chat([{"role": "user", "content": content}], max_tokens=12, logprobs=True, top_logprobs=20)
    turns = [("user", [canonical(file), QUESTION])]
    answer = unsplit.answer_ids(turns, 12)
    told = reply["choices"][0]["logprobs"]["content"]
    assert len(told) == len(answer) > 3
    for item, row in zip(told, unsplit.told(turns, answer), strict=True):
        found = [one["logprob"] for one in item["top_logprobs"]]
        assert found == pytest.approx(row.topk(20).values.tolist(), abs=2e-4)


def test_choices_are_weighed_as_by_the_unsplit_model(pair):
    system, unsplit = pair
    file = save(photograph("coffee", (150, 250)), "PNG")
    image = system.upload(file)["id"]
    asked = [{"text": text, "choices": CHOICES} for text in (QUESTION, "Well?")]
    for answer, question in zip(system.ask(image, asked), asked, strict=True):
        expected = unsplit.weighed([("user", [canonical(file), question["text"]])], CHOICES)
        assert answer["choices"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_halves_in_int8_answer_together(tmp_path):
    model, int8 = make_random_checkpoint(tmp_path / "model"), ("--quantization", "int8")
    told = (*int8, "--encoder-quantization", "int8")
    with System(model, tmp_path, vision_args=int8, language_args=told) as system:
        image = system.upload(save(photograph("coffee", (150, 100)), "PNG"))["id"]
        (answer,) = system.ask(image, [QUESTION], max_tokens=4, temperature=0)
        assert answer["text"] and answer["receipt"]["fingerprint"] == system.describe(system.visions[0]).fingerprint


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_served_and_counted_as_transformers_builds_it(name):
    config = published(name)
    assert FAMILY.problems(config, FAMILY.preprocessor({}), Half) == []
    counted = size_of(FAMILY, config, FAMILY.preprocessor({"min_pixels": 3136, "max_pixels": 12845056}))
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(config))
    model.tie_weights()
    tower = sum(parameter.numel() for parameter in model.model.visual.parameters())
    assert counted.halves[Half.VISION].parameters == tower
    assert counted.halves[Half.LANGUAGE].parameters == model.num_parameters() - tower
    assert (counted.tied, counted.context, counted.stored) == (name == "3B", 128000, "bfloat16")
    arch = SIZES[name.lower()]
    assert FAMILY.architecture(config) == arch
    ids = {"<|endoftext|>": 0, "<|im_end|>": 1, "<|image_pad|>": 2, "<|video_pad|>": 3}
    ids |= {"<|vision_start|>": 4, "<|vision_end|>": 5}
    for layout in ("published", "nested"):
        made = model_config(arch, ids, layout=layout, tied=counted.tied, dtype="bfloat16")
        assert FAMILY.architecture(made) == arch and FAMILY.tied_head(made) == counted.tied
        names = tensor_shapes(arch, layout=layout, tied=counted.tied)
        assert {FAMILY.locate(tensor)[0] for tensor in names} == set(Half)
        assert sum(map(math.prod, names.values())) == model.num_parameters()


@pytest.mark.parametrize(("name", "parameters"), [("3B", "3,754,622,976"), ("7B", "8,292,166,656")])
def test_plan_knows_its_figures(tmp_path, name, parameters):
    model = write_settings(tmp_path / name, published(name))
    done = invoke("plan", "--model", model, "--gpus", "24,80")
    assert done.returncode == 0, done.stderr
    halves = size_of(FAMILY, published(name), FAMILY.preprocessor({})).halves
    assert f"{sum(half.parameters for half in halves.values()):,}" == parameters
    for half in Half:
        assert f"{halves[half].parameters:,} parameters" in done.stdout


def test_doctor_finds_a_whole_checkpoint(checkpoint, tmp_path):
    done = invoke("doctor", "--model", checkpoint, "--data-dir", tmp_path, "--port", "0", "--json")
    found = {finding["check"]: finding for finding in json.loads(done.stdout)}
    assert found["checkpoint"]["status"] == "ok" and "whole, both halves" in found["checkpoint"]["detail"]


@pytest.mark.parametrize(
    ("vision", "outer", "said"),
    [
        ({"hidden_act": "gelu"}, {}, "hidden_act 'gelu' is not supported (silu); use a checkpoint of Qwen2.5-VL"),
        ({"window_size": 27}, {}, "window_size 27 must be at least a token's 28 pixels"),
        ({"fullatt_block_indexes": "all"}, {}, "fullatt_block_indexes must be numbers of blocks, got 'all'"),
        ({"out_hidden_size": 128}, {}, "vision_config.out_hidden_size 128 differs from the language model's 64"),
        ({"num_heads": 3}, {}, "vision_config.hidden_size 64 must be num_heads 3 times a multiple of 4"),
        ({}, {"architectures": ["Qwen2_5_VLModel"]}, "use a checkpoint of Qwen2_5_VLForConditionalGeneration"),
        ({}, {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported (silu); use a checkpoint of Qwen2.5-VL"),
    ],
)
def test_what_cannot_be_computed_is_said_before_anything_is_loaded(tmp_path, vision, outer, said):
    path = make_random_checkpoint(tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    config |= outer | {"vision_config": config["vision_config"] | vision}
    (path / "config.json").write_text(json.dumps(config))
    assert any(said in problem for problem in check_checkpoint(str(path)).problems)


def test_another_window_is_another_encoder(tmp_path):
    prints = []
    for number, dimensions in enumerate([{}, {"window": 56}, {"full_blocks": (0, 1)}]):
        path = make_random_checkpoint(tmp_path / str(number), **dimensions)
        prints.append(open_checkpoint(str(path)).encoder_spec("float32").vision_config)
    assert prints[0] != prints[1] != prints[2] != prints[0]


def test_dimensions_that_cannot_be(tmp_path):
    with pytest.raises(CheckpointError, match="window 20 is smaller than a token, 28 pixels"):
        make_random_checkpoint(tmp_path / "model", window=20)
