"""What a checkpoint's generation_config.json says of sampling is what a request is given that leaves it out."""

from __future__ import annotations

import json
import shutil

import pytest

from gateway.routing.variants import ModelCard
from lookonce.core.errors import CheckpointError
from lookonce.models.chat.generation_config import SamplingDefaults, sampling_defaults
from lookonce.models.checkpoint.check import check_checkpoint
from tests.lm.split import answer, asking, running, user

STATED = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.25}
READ = {
    "published": (
        {"do_sample": True, "temperature": 0.01, "top_p": 0.001, "top_k": 1, "repetition_penalty": 1.0},
        {"temperature": 0.01, "top_p": 0.001, "top_k": 1},
    ),
    "greedy": ({"do_sample": False, "temperature": 0.7, "top_p": 0.5}, {}),
    "greedy with a penalty": ({"do_sample": False, "repetition_penalty": 1.05}, {"repetition_penalty": 1.05}),
    "sampled": ({"do_sample": True}, {"temperature": 1.0}),
    "a temperature alone": ({"temperature": 0.6, "top_k": -1, "min_p": 0.05}, {"temperature": 0.6, "min_p": 0.05}),
    "nothing": ({"max_new_tokens": 64, "temperature": None}, {}),
}
REFUSED = {
    "temperature": (3, "temperature must be from 0 to 2, got 3"),
    "top_p": (0, "top_p must be above 0 and at most 1, got 0"),
    "top_k": (2.5, "top_k must be a whole number"),
    "repetition_penalty": ("high", "repetition_penalty must be above 0"),
}


@pytest.fixture
def own(checkpoint_path, tmp_path):
    path = shutil.copytree(checkpoint_path, tmp_path / "own")
    stated = json.loads((path / "generation_config.json").read_text()) | STATED
    (path / "generation_config.json").write_text(json.dumps(stated))
    return path


@pytest.mark.parametrize(("stated", "expected"), READ.values(), ids=READ)
def test_reading(tmp_path, stated, expected):
    (tmp_path / "generation_config.json").write_text(json.dumps(stated))
    assert sampling_defaults(tmp_path) == SamplingDefaults(**expected)
    assert sampling_defaults(tmp_path).stated == expected


def test_without_the_file_decoding_is_greedy(tmp_path):
    assert sampling_defaults(tmp_path) == SamplingDefaults()


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_sampled_with_is_refused_by_the_check(own, name):
    value, said = REFUSED[name]
    (own / "generation_config.json").write_text(json.dumps({name: value}))
    with pytest.raises(CheckpointError, match=said):
        sampling_defaults(own)
    assert any(said in problem for problem in check_checkpoint(str(own)).problems)


async def test_requests_are_given_them_and_override_them(own, tmp_path):
    question = user("Tell me something.")
    explicit = {name: value for name, value in STATED.items() if name != "do_sample"}
    (tmp_path / "none").mkdir()
    async with running(own, tmp_path / "none", generation_config="none") as plain:
        greedy = await answer(plain, asking(question))
        sampled = await answer(plain, asking(question, seed=3, **explicit))
        hot = await answer(plain, asking(question, seed=3, **(explicit | {"temperature": 0.4})))
        described = await plain.describe()
    assert greedy.ids != sampled.ids, "else this shows nothing"
    assert not described.sampling_defaults.ListFields()
    async with running(own, tmp_path) as client:
        assert (await answer(client, asking(question, seed=3))).ids == sampled.ids
        assert (await answer(client, asking(question, seed=3, temperature=0.4))).ids == hot.ids
        assert (await answer(client, asking(question, temperature=0.0, repetition_penalty=1.0))).ids == greedy.ids
        assert (await answer(client, asking(question, top_k=1, repetition_penalty=1.0))).ids == greedy.ids
        description = await client.describe()
    shown = ModelCard(("model",), description).to_openai("model")
    assert shown["sampling_defaults"] == pytest.approx(explicit) and shown["family"] == "qwen2_vl"
