"""Packing, the lean model and the teaching code, against transformers and against themselves."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from training.shapes import (
    answers,
    codes,
    deepen,
    export,
    feed,
    guide,
    optim,
    pack,
    pixels,
    questions,
    scenes,
    tokenizer,
)
from training.shapes.model import Qwen2VL, Shape2VL, layers_of
from training.shapes.stage_answers import Encoded
from training.shapes.stage_vision import normalise


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A checkpoint folder with random weights and a tokenizer of few words."""
    path = tmp_path_factory.mktemp("shapes")
    torch.manual_seed(0)
    tokenizer.build(tokenizer.corpus(200)).save(str(path / "built.json"))
    save_file(Qwen2VL(Shape2VL()).state_dict(), path / "state.safetensors")
    export.export(path / "state.safetensors", path / "built.json", path / "out")
    return path / "out"


@pytest.fixture(scope="session")
def words(folder):
    return tokenizer.load(folder / "tokenizer.json")


@pytest.mark.parametrize(
    "text", ["How many red stars?", "HOW MANY??", "Grüße, 你好 \U0001f600", "", "a\x00b\n\n  c", "<|im_start"]
)
def test_any_text_survives_the_tokenizer(folder, words, text):
    published = AutoTokenizer.from_pretrained(folder)
    ids = published(text).input_ids
    assert tuple(ids) == words.encode(text)
    assert published.decode(ids, skip_special_tokens=True) == text


def test_words_of_the_questions_are_single_tokens(words):
    for word in (*scenes.COLOURS, *scenes.KINDS, *questions.PLURAL.values()):
        assert len(words.encode(f" {word}")) == 1, word


def test_patches_equal_the_image_processors(folder):
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    for seed in range(5):
        image = scenes.draw(seed).image
        expected = processor(image, return_tensors="pt")
        flat, grid = pixels.patches(image)
        both = normalise(flat).view(-1, 3, 1, 14, 14).expand(-1, 3, 2, 14, 14).reshape(len(flat), -1)
        assert expected["image_grid_thw"].tolist() == [[1, grid[0] * 2, grid[1] * 2]]
        torch.testing.assert_close(both, expected["pixel_values"], atol=1e-5, rtol=0)


def test_packed_logits_equal_transformers(folder, words):
    """Every answer token's logits in one packed row are those of transformers on that conversation alone."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    lean = Qwen2VL(Shape2VL())
    lean.load_state_dict(model_state(folder))
    scene = scenes.draw(5)
    flat, grid = pixels.patches(scene.image)
    processed = Qwen2VLImageProcessorPil.from_pretrained(folder)(scene.image, return_tensors="pt")
    row = pack.pack_row(
        words, scene.shapes, scene.image.size, grid, np.random.default_rng(1), pack.MIXED, 260, variety=0.0
    )
    batch = pack.collate([row])
    pad = words.ids["<|image_pad|>"]
    ids, segment = torch.from_numpy(batch["ids"]), torch.from_numpy(batch["segment"])
    with torch.no_grad():
        x = lean.embed(ids, ids == pad, lean.visual(normalise(flat)[None], grid).flatten(0, 1))
        mask = answers.attention_mask(segment, torch.from_numpy(batch["sees"]))
        packed = lean.lm_head(lean.model(x, torch.from_numpy(batch["positions"]), mask))[0]
        assert row.segments >= 5
        for number in range(1, row.segments + 1):
            alone = (segment[0] == 0) | (segment[0] == number)
            input_ids = ids[:, alone]
            out = model(input_ids=input_ids, mm_token_type_ids=(input_ids == pad).int(), **processed).logits[0]
            torch.testing.assert_close(
                packed[segment[0] == number], out[input_ids.shape[1] - (segment[0] == number).sum() :]
            )


def model_state(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_text_only_segments_do_not_see_the_image(words):
    rng = np.random.default_rng(0)
    scene = scenes.draw(5)
    row = pack.pack_row(words, scene.shapes, scene.image.size, (7, 7), rng, pack.MIXED, 900, variety=1.0)
    batch = pack.collate([row])
    mask = answers.attention_mask(torch.from_numpy(batch["segment"]), torch.from_numpy(batch["sees"]))[0, 0]
    blind = ~torch.from_numpy(batch["sees"])[0]
    prefix = torch.from_numpy(batch["segment"])[0] == 0
    assert blind.any()
    assert not mask[blind][:, prefix].any()
    assert mask[~blind & ~prefix][:, prefix].all()


def test_batches_repeat(folder):
    args = (str(folder / "tokenizer.json"), 3, 6, pack.MIXED, 200, 0.3)
    first, second = feed.image_batch(9, *args), feed.image_batch(9, *args)
    assert first["grid"] == second["grid"]
    for key in ("patches", "ids", "positions", "segment", "loss"):
        assert np.array_equal(first[key], second[key])


def test_descriptions_are_guided_group_by_group(words):
    pairs = [("red", "circle"), ("blue", "star"), ("red", "circle")]
    shapes = scenes.draw(9, pairs=pairs, size=(300, 300)).shapes
    answer = words.encode(questions.describe(shapes))
    guided = guide.listing(answer, words.colours, words.kinds, shapes)
    said = [words.decode([token]).strip() for token in answer]
    assert said == ["Two", "red", "circles", ",", "a", "blue", "star", "."]
    assert [token.shapes for token in guided] == [[0, 2]] * 3 + [[1]] * 4 + [[]]
    assert [word for word, token in zip(said, guided, strict=True) if token.amount] == ["Two", "a"]
    known = [tuple(said[place] for place in token.said) if token.said else None for token in guided]
    red, blue = ("red", "circles"), ("blue", "star")
    assert known == [None, None, None, red, red, None, None, blue]


def test_referents_are_what_a_question_names():
    shapes = scenes.draw(9, pairs=[("red", "circle"), ("blue", "star"), ("red", "star")], size=(300, 300)).shapes
    assert guide.named("How many red shapes are there?", shapes) == [0, 2]
    assert guide.named("Is there a blue star?", shapes) == [1]
    assert guide.named("Count the shapes.", shapes) == []


def test_codes_are_read_back_as_written():
    marks = [torch.tensor([[3, 1, 2], [8, 4, 7]])]
    numbers = [torch.tensor([[0.1, 0.2, 1.0], [0.0, 0.0, -1.0]])]
    directions = codes.basis(128)
    code = codes.write(9, marks, numbers)
    torch.testing.assert_close(codes.read(codes.tokens(code, directions), directions), code, atol=1e-5, rtol=1e-5)
    _, figures = codes.loss(codes.tokens(code, directions), directions, code)
    assert figures["kind"] == figures["colour"] == figures["presence_scene"] == 1.0


def test_a_shape_on_a_border_goes_to_the_cell_that_claims_it():
    presence = torch.zeros(1, 9)
    presence[0, 5] = 3.0
    marks, numbers = [torch.tensor([[4, 0, 0]])], [torch.tensor([[0.95, 0.0, 0.0]])]
    moved, shifted = codes.place(marks, numbers, 3, presence)
    assert moved[0][0, 0] == 5
    assert shifted[0][0, 0] == pytest.approx(-1.05)
    centred = [torch.tensor([[0.2, 0.0, 0.0]])]
    assert codes.place(marks, centred, 3, presence)[0][0][0, 0] == 4


def test_muon_steps_along_an_orthogonal_matrix():
    torch.manual_seed(0)
    spread = torch.linalg.svdvals(optim.orthogonalise(torch.randn(64, 128)))
    assert spread.min() > 0.6 and spread.max() < 1.3


def test_a_deepened_model_says_the_same_and_its_new_layers_can_learn(folder, words):
    shallow = Qwen2VL(Shape2VL(layers=4))
    state = deepen.deepen(shallow.state_dict())
    deep = Qwen2VL(Shape2VL(layers=layers_of(state)))
    deep.load_state_dict(state)
    data = feed.image_batch(1, str(folder / "tokenizer.json"), 2, 4, pack.LISTS, 120, 0.0, alike=1.0)
    ends = words.ids["<|image_pad|>"], words.ids["<|im_end|>"]
    losses = [
        answers.answer_loss(model, model.visual(normalise(data["patches"]), data["grid"]), data, *ends).loss
        for model in (shallow, deep)
    ]
    assert len(deep.model.layers) == 6
    assert torch.equal(*losses)
    losses[1].backward()
    assert all(deep.model.layers[number].self_attn.o_proj.weight.grad.any() for number in (3, 4))


def test_scenes_of_alike_shapes_have_groups_and_no_held_out_pair():
    rng = np.random.default_rng(0)
    drawn = [scenes.alike(5, rng) for _ in range(300)]
    assert all(len(pairs) == 5 and not scenes.HELD_OUT & set(pairs) for pairs in drawn)
    assert sum(len(set(pairs)) < 5 for pairs in drawn) > 200


def test_an_encoded_batch_guides_to_the_cells_that_claim_the_shapes(folder):
    torch.manual_seed(3)
    model = Qwen2VL(Shape2VL())
    args = (str(folder / "tokenizer.json"), 3, 6, pack.LISTS, 200, 0.0, 0.5)
    batch, drawn = Encoded(model)(9, *args), feed.image_batch(9, *args)
    with torch.no_grad():
        tokens = model.visual(normalise(drawn["patches"]), drawn["grid"])
        placed = codes.target(drawn, tokens, codes.basis(128))[1]
    assert np.array_equal(batch["image_tokens"], tokens.numpy()) and "patches" not in batch
    assert [mark.tolist() for mark in batch["marks"]] == [mark.tolist() for mark in placed]
    image = batch["ids"].tolist()[0].index(model_pad(folder))
    targets = batch["guides"][guide.LOOK, 0][2]
    cells = {image + int(mark[0]) for marks in batch["marks"] for mark in marks}
    assert set(np.flatnonzero(targets.any(0))) <= cells | {guide.SINK}


def model_pad(folder):
    return tokenizer.load(folder / "tokenizer.json").ids["<|image_pad|>"]


@pytest.mark.slow
def test_the_whole_recipe_runs_from_nothing(tmp_path):
    command = [sys.executable, "-m", "training.shapes", "--work", str(tmp_path), "--scale", "0.003", "--scenes", "10"]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert "float32" in (tmp_path / "out" / "README.md").read_text()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 6


def test_a_few_steps_lower_the_loss(folder, words):
    torch.manual_seed(1)
    model = Qwen2VL(Shape2VL())
    optimisers = optim.Optimisers([model], muon_lr=0.02, adam_lr=2e-3)
    data = feed.image_batch(1, str(folder / "tokenizer.json"), 2, 2, pack.LOOKUPS, 100, 0.0)
    losses = []
    for _ in range(5):
        tokens = model.visual(normalise(data["patches"]), data["grid"])
        result = answers.answer_loss(model, tokens, data, words.ids["<|image_pad|>"], words.ids["<|im_end|>"])
        (result.loss + result.guide).backward()
        optimisers.step(1.0)
        losses.append(result.loss.item())
    assert result.total and losses[-1] < 0.8 * losses[0]
