"""Families with recurrent layers: a prefix is its KV and the state at its end, and answers are the unsplit model's."""

from __future__ import annotations

import json

import pytest
import torch
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

from lookonce.core.errors import CheckpointError
from lookonce.models.checkpoint.check import open_checked
from lookonce.models.family import Half
from lookonce.models.general import recurrent
from lookonce.models.general.architecture import Architecture
from lookonce.models.general.limits import unpacked
from lookonce.models.sizing import size_of
from tests.cli.commands import invoke
from tests.families.models_page import No, Served
from tests.families.test_general import CHOICES, IMAGE, OTHER, QUESTION, Split, check_packed, user
from tests.families.tiny_recurrent import FAMILIES, make
from tests.families.unsplit_general import Unsplit
from tests.system.cluster import System, data_url, encoded, image_part, text_part


def served(models, model_type):
    return Served(
        models,
        model_type,
        split="test_questions_over_rest",
        packed="engine/test_recurrent.py::test_many_questions_at_once_are_answered_as_alone",
        prefix="test_every_family",
        scores="test_every_family",
        video=No("families/test_models_page.py::test_video_is_no_part_of_a_chat"),
        quantised=No("families/test_general.py::test_int8_is_refused"),
    )


SERVED = (
    served("Qwen3.5 and 3.6: 0.8B, 2B, 4B, 9B, 27B", "qwen3_5"),
    served("Qwen3.5 and 3.6 of experts: 35B-A3B, 122B-A10B, 397B-A17B", "qwen3_5_moe"),
    served("LFM3-VL 2B", "lfm3_vl"),
)
AT_ONCE = ("qwen3_5", "lfm3_vl")
TEXTS = ("why?", "how many cats are there?", "what is on this image?", "is a cat on this image? yes no " * 8)


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory):
    made = {}

    def path_of(family):
        if family not in made:
            made[family] = make(family, tmp_path_factory.mktemp("recurrent") / family)
        return made[family]

    return path_of


@pytest.mark.parametrize(
    "family", [name if name in AT_ONCE else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
async def test_every_family(family, checkpoint_of, monkeypatch):
    await check_packed(checkpoint_of(family), monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_questions_over_rest(family, checkpoint_of, patch, tmp_path):
    """Two processes of halves, started again between questions: one encode, and each question its own text only."""
    checkpoint, halves = checkpoint_of(family), tmp_path / "halves"
    unsplit = Unsplit(checkpoint, patch)
    done = invoke("split", checkpoint, halves)
    assert done.returncode == 0, done.stderr
    with System(halves, tmp_path) as system:
        image = system.upload(encoded(IMAGE))["id"]
        asked = [*TEXTS, {"text": QUESTION, "choices": CHOICES}]
        *texts, weighed = system.ask(image, asked, temperature=0, max_tokens=12)
        assert [each["text"] for each in texts] == [unsplit.answer(user(IMAGE, text)) for text in TEXTS]
        assert weighed["choices"] == pytest.approx(unsplit.weighed(CHOICES, user(IMAGE, QUESTION)), abs=1e-4)
        many = [f"{QUESTION} {number} {'a cat ' * (number % 7)}" for number in range(32)]
        for text, told in zip(many, system.ask(image, many, temperature=0, max_tokens=6), strict=True):
            ids = unsplit.inputs(user(IMAGE, text))["input_ids"][0].tolist()
            behind = ids[::-1].index(unsplit.tokenizer.convert_tokens_to_ids("<|image_pad|>"))
            assert told["text"] == unsplit.answer(user(IMAGE, text), 6)
            assert told["receipt"]["cached_tokens"] == len(ids) - behind
        check_turns(system, unsplit)
        assert system.encodes() == 2
    with System(halves, tmp_path) as system:
        for number in range(10):
            (answer,) = system.ask(image, [f"{QUESTION} {number}"], temperature=0, max_tokens=4)
            assert answer["text"] == unsplit.answer(user(IMAGE, f"{QUESTION} {number}"), 4)
        assert system.encodes() == 0


def check_turns(system, unsplit):
    """Several images over several turns."""
    turns = [
        ("system", ["answer the question"]),
        ("user", ["what is on this image?", IMAGE, OTHER]),
        ("assistant", ["a cat"]),
        ("user", [OTHER, "and on this?"]),
        ("assistant", ["no cat"]),
        ("user", ["why?"]),
    ]
    for count in (2, 4, 6):
        messages = [{"role": role, "content": [part_of(part) for part in parts]} for role, parts in turns[:count]]
        reply = system.chat(messages, max_tokens=12)
        assert reply["choices"][0]["message"]["content"] == unsplit.answer(turns[:count])


def part_of(part):
    return text_part(part) if isinstance(part, str) else image_part(data_url(encoded(part)))


def test_a_state_that_is_lost_between_steps_is_noticed_at_start(checkpoint_of, monkeypatch):
    last = recurrent._last
    monkeypatch.setattr(recurrent, "_last", lambda *rest: last(*rest) * 0)
    with pytest.raises(CheckpointError, match="the packed step of the general path differs from the class's own"):
        Split(checkpoint_of("qwen3_5"))


@pytest.mark.parametrize("family", FAMILIES)
def test_its_sizes_are_those_of_the_loaded_model(family, checkpoint_of):
    path = checkpoint_of(family)
    checkpoint = open_checked(str(path), Half.LANGUAGE)
    size = size_of(checkpoint.family, checkpoint.config, checkpoint.preprocessor)
    layers = [torch.device("cpu")] * size.dimensions.layers
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        shape = checkpoint.family.load_text(checkpoint, dtype, lambda _: layers[0], layers).shape
        assert shape.state_bytes == size.state_bytes(name) > 0
        assert shape.token_bytes == size.kv_bytes(1, name) and shape.layers < size.dimensions.layers


def test_plan_names_the_state(checkpoint_of):
    done = invoke("plan", "--model", checkpoint_of("qwen3_5"), "--ram", "16")
    assert done.returncode == 0 and "recurrent state" in done.stdout, done.stderr


def test_a_layer_of_an_unknown_kind_is_refused(checkpoint_of, monkeypatch):
    monkeypatch.setattr(Qwen3_5GatedDeltaNet, "forward", lambda self, hidden_states, **_: hidden_states)
    config = json.loads((checkpoint_of("qwen3_5") / "config.json").read_text())
    problem = unpacked(Architecture(config))
    assert "or keeps a state that is known here (short convolutions, gated delta rules)" in problem
