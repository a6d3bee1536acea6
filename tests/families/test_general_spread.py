"""The general path's layers on several devices: every operation finds its operands on one device, and the answers are
the unsplit model's.

There is no GPU: the devices are stand-ins (see `tests/standin.py`)."""

from __future__ import annotations

import asyncio
import json

import pytest
import torch

from lm_service.app import load
from lm_service.engine.packed import device_map
from lm_service.engine.packed.device_map import Home
from lm_service.engine.packed.engine import PackedEngine
from lm_service.engine.packed.options import PackedOptions
from lm_service.engine.types import ScoreItem, Scoring
from lm_service.prompt import Message
from lm_service.settings import LanguageSettings
from lookonce.core.errors import CheckpointError
from lookonce.core.layer_split import consecutive
from lookonce.models.general import self_check
from lookonce.models.text_adapter import Stage
from tests import standin
from tests.engine.lab import ask, generation
from tests.families.test_general import IMAGE, OTHER, QUESTION, Shelf, Split, user
from tests.families.tiny_checkpoints import FAMILIES, make, make_tiny
from tests.families.tiny_gemma import GEMMAS
from tests.families.tiny_recurrent import FAMILIES as RECURRENT
from tests.families.unsplit_general import Unsplit

TINIES = FAMILIES | GEMMAS
AT_ONCE = ("blip2",)
"""With embeddings of positions and a norm beside the layers; the others are for `make test-slow`."""
_FLOWS = 8
"""Tensors that go over a border in a step at most, whatever the layers behind it: hidden states, cosines, sines,
positions, rows, a mask of ones, and the plan's two; more where there is a plan for each window."""


@pytest.mark.parametrize(
    "family", [name if name in AT_ONCE else pytest.param(name, marks=pytest.mark.slow) for name in TINIES]
)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
async def test_answers_are_the_unsplit_models(family, tmp_path, monkeypatch):
    path = make_tiny(TINIES[family], tmp_path / family)
    if family == "gemma3":  # its own masks are made by vmap, which knows no stand-in
        monkeypatch.setattr(self_check, "check_text", lambda *_: 0.0)
    layers = json.loads((path / "config.json").read_text())["text_config"]["num_hidden_layers"]
    home = Home(tuple(standin.device(index) for index in range(2)), tuple(consecutive((1, layers - 1))))
    unsplit, split = Unsplit(path, monkeypatch), Split(path, home)
    assert split.model.shape.stages == (Stage(standin.device(0), 1), Stage(standin.device(1), layers - 1))
    encoded = [split.encoded(image, number) for number, image in enumerate((IMAGE, OTHER))]
    options = PackedOptions(kv_bytes=8 << 20, prefix_bytes=8 << 20, step_tokens=37, burst_tokens=37)
    engine = PackedEngine(split.model, split.template.table, frozenset(), options)

    async def check(image, reference, text):
        turns = user(image, text)
        (answer,) = await ask(engine, generation(split.prompts.build([Message("user", (reference, text))]), 6))
        expected = unsplit.logprobs(turns, answer.tokens)[:-1]
        assert list(answer.tokens) == expected.argmax(-1).tolist()
        for row, token, given in zip(expected, answer.tokens, answer.logprobs, strict=True):
            assert given.logprob == pytest.approx(float(row[token]), abs=2e-4)
        return answer.finish.timings

    await engine.start(Shelf(encoded))
    try:
        pairs = [(image, reference) for image, (reference, _) in zip((IMAGE, OTHER), encoded, strict=True)]
        await asyncio.gather(*(check(*pair, text) for pair in pairs for text in (QUESTION, "why?")))
        standin.COPIES.clear()
        before = engine.describe().steps
        assert (await check(*pairs[0], "how many cats are there?")).prefix_hit is (not family.startswith("paligemma"))
        steps = engine.describe().steps - before
        assert steps <= standin.COPIES["standin:0", "standin:1"] <= (_FLOWS + (4 if family in GEMMAS else 0)) * steps
        prompt = split.prompts.build([Message("user", (pairs[0][1], QUESTION))])
        scored = await engine.score(Scoring("s", (ScoreItem(prompt, ((7, 9),)),)))
        told = unsplit.logprobs(user(IMAGE, QUESTION), [7, 9])
        assert scored.logprobs[0][0] == pytest.approx(float(told[0][7] + told[1][9]), abs=4e-4)
    finally:
        await engine.close()


def test_a_service_takes_device_map(tmp_path, monkeypatch):
    """Each weight lies where its layer is; a head that is tied to the embedding is with it."""
    monkeypatch.setattr(device_map, "choose_device", lambda name: standin.device(int(name[-1])))
    path = make("llava", tmp_path / "llava")
    settings = {"device_map": "standin:0=0-1,standin:1=2-2", "kv_bytes": 1 << 20, "prefix_bytes": 1 << 20}
    engine = load(LanguageSettings(model=str(path), dtype="float32", **settings)).engine
    assert engine.describe().model.device == "standin:0=0-1,standin:1=2-2"
    model = engine._model
    first, last = standin.device(0), standin.device(1)
    places = {name: tensor.device for name, tensor in model._decoder.state_dict().items()}
    assert {name for name, device in places.items() if device == last} == {
        name for name in places if name.startswith(("layers.2.", "norm."))
    }
    assert set(places.values()) == {first, last} and model._head.weight.device == last
    assert torch.isfinite(model._head.weight.cpu()).all()


def test_recurrent_state_is_kept_on_one_device(tmp_path):
    path = make_tiny(RECURRENT["qwen3_5"], tmp_path / "model")
    said = "has recurrent state, which is kept on one device; leave out --device-map"
    settings = LanguageSettings(model=str(path), dtype="float32", device_map="standin:0,standin:1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_map, "choose_device", lambda name: standin.device(int(name[-1])))
        with pytest.raises(CheckpointError, match=said):
            load(settings)
    stages = load(LanguageSettings(model=str(path), dtype="float32", device="cpu")).engine._model.shape.stages
    assert stages == (Stage(torch.device("cpu"), 1),), "keys and values of the layers that attend, and of no other"
