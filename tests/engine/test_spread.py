"""Layers on several devices: every operation finds its operands on one device, and the answers are the model's own.

There is no GPU: the devices are stand-ins (see `standin.py`)."""

from __future__ import annotations

import asyncio

import pytest
import torch

from lm_service.engine.packed.device_map import Home
from lm_service.engine.types import ScoreItem, Scoring
from lookonce.core.layer_split import consecutive
from lookonce.models.checkpoint import Half, open_checkpoint
from lookonce.models.qwen2_vl.modules import load_language_model
from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from lookonce.models.qwen2_vl.text import Qwen2VLAdapter
from tests import standin
from tests.engine.lab import Lab, an_image, ask, generation, prompt, words

SYSTEM = words(9, 1)


class SpreadLab(Lab):
    """The engine's side with so many layers on each stand-in; transformers' on the CPU."""

    def __init__(self, path, counts):
        super().__init__(path)
        devices = tuple(standin.device(index) for index in range(len(counts)))
        self.path = path
        self.home = Home(devices, tuple(consecutive(counts)))
        checkpoint = open_checkpoint(str(path), needs=Half.LANGUAGE)
        self.tied = checkpoint.tied_head
        self.weights = load_language_model(checkpoint, torch.float32, self.home.of)
        self.adapter = Qwen2VLAdapter(*self.weights)


@pytest.fixture(scope="module", params=[((3, 1), True), ((1, 1, 2), False)], ids=["two devices", "three, head apart"])
def spread(request, tmp_path_factory):
    counts, tied = request.param
    path = make_random_checkpoint(tmp_path_factory.mktemp("spread") / "four", size="tiny", layers=4, tied=tied)
    return SpreadLab(path, counts)


def test_a_mixture_is_refused():
    """The stand-in notices what it is there to notice."""
    one, other = torch.ones(2, device=standin.device(0)), torch.ones(2, device=standin.device(1))
    with pytest.raises(RuntimeError, match="standin:0, standin:1"):
        one + other
    with pytest.raises(RuntimeError, match="cpu, standin:0"):
        one + torch.ones(2)
    assert (one + other.to(one.device)).tolist() == [2.0, 2.0]


async def test_answers_are_those_of_transformers(spread):
    """Prefills whole and in pieces, shared prefixes, a conversation, growth of slots, several answers, scores."""
    images = [an_image(1, 9, 11), an_image(2, 2, 3)]
    prompts = [prompt(SYSTEM, images[i % 2], words(24 + i, 100 + i)) for i in range(2)] + [prompt(words(40, 7))]
    items = tuple(ScoreItem(wanted, ((5,), (6, 7), (6, 8))) for wanted in prompts[:2])
    async with spread.engine(step_tokens=24, burst_tokens=50) as engine:
        answers = await asyncio.gather(*(ask(engine, generation(wanted, 9)) for wanted in prompts))
        for wanted, (answer,) in zip(prompts, answers, strict=True):
            spread.check(wanted, answer)
        again = prompt(SYSTEM, images[0], words(24, 100), answers[0][0].tokens, words(40, 9))
        (answer,) = await ask(engine, generation(again, 5))
        spread.check(again, answer)
        assert answer.finish.timings.cached_tokens > 9 + 99
        for answer in await ask(engine, generation(prompts[0], 3, n=2)):
            spread.check(prompts[0], answer)
        scores = await engine.score(Scoring("s", items))
    spread.check_scores(items, scores, 5e-4)


async def test_each_layer_lies_with_its_keys_and_values(spread):
    async with spread.engine() as engine:
        await ask(engine, generation(prompt(SYSTEM, an_image(1, 9, 11), words(5, 2)), 3))
        core, model = engine._core, spread.weights[0]
        first, last = spread.home.devices[0], spread.home.devices[-1]
        assert (model.embed_tokens.weight.device, model.norm.weight.device) == (first, last)
        assert spread.adapter._head_device == (first if spread.tied else last)
        for index, layer in enumerate(model.layers):
            expected = spread.home.of(f"model.layers.{index}.")
            assert layer.input_layernorm.weight.device == expected
            held = [core.pool.flat(index)[0], *(node.kv.layers[index][1] for node in core.cache)]
            assert len(held) > 1 and {tensor.device for tensor in held} == {expected}
        assert core.cache.bytes == sum(node.kv.nbytes for node in core.cache)
        assert core.pool.bytes <= core.options.kv_bytes


async def test_a_step_moves_what_flows_once_a_border(spread):
    """Hidden states, cosines, sines and rows go over each border once a step, whatever the layers on a side; the plan
    goes to every device from the first."""
    async with spread.engine() as engine:
        standin.COPIES.clear()
        await ask(engine, generation(prompt(words(20, 6)), 5, logprobs=None))
        steps = engine.describe().steps
    assert steps == 5
    for number in range(1, len(spread.home.devices)):
        flows = standin.COPIES[f"standin:{number - 1}", f"standin:{number}"]
        plans = 2 if number == 1 else 0  # a mask and the rows of the pool
        assert flows == (4 + plans) * steps


async def test_int8_layers_are_quantised_on_their_way(spread, monkeypatch):
    """Read to the CPU, brought to their devices one by one; the answers are near the plain ones, and not the same."""
    checkpoint = open_checkpoint(str(spread.path), needs=Half.LANGUAGE)
    weights = load_language_model(checkpoint, torch.float32, spread.home.of_unquantized)
    assert {layer.mlp.up_proj.weight.device.type for layer in weights[0].layers} == {"cpu"}
    assert weights[0].embed_tokens.weight.device == spread.home.devices[0]
    adapter = Qwen2VLAdapter(*weights, quantization="int8", devices=spread.home.of_layers)
    assert [stage.device for stage in adapter.shape.stages] == list(spread.home.devices)
    monkeypatch.setattr(spread, "adapter", adapter)
    wanted = prompt(SYSTEM, an_image(1, 9, 11), words(5, 2))
    async with spread.engine() as engine:
        (answer,) = await ask(engine, generation(wanted, 4))
    plain = spread.logits(wanted, answer.tokens).log_softmax(-1)[len(wanted.token_ids) - 1 : -1]
    expected = [float(row[token]) for row, token in zip(plain, answer.tokens, strict=True)]
    errors = [abs(one.logprob - other) for one, other in zip(answer.logprobs, expected, strict=True)]
    assert 1e-4 < max(errors) < 0.3
