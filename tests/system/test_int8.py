"""Both services on int8 weights: they answer together; a language service that was not told refuses the embeddings."""

from __future__ import annotations

import pytest

from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from tests.pictures import photograph, save
from tests.system.cluster import System

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("int8")]
INT8 = ("--quantization", "int8")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_random_checkpoint(tmp_path_factory.mktemp("int8") / "model", max_pixels=100 * 28 * 28)


def answer(system):
    image = system.upload(save(photograph("coffee", (150, 100)), "PNG"))["id"]
    return system.ask(image, ["What is it?"], max_tokens=4, temperature=0)[0]


def test_halves_in_int8_answer_together(model, tmp_path):
    told = (*INT8, "--encoder-quantization", "int8")
    with System(model, tmp_path, vision_args=INT8, language_args=told) as system:
        found = answer(system)
        assert found["text"] and found["receipt"]["fingerprint"] == system.describe(system.visions[0]).fingerprint


def test_embeddings_in_int8_are_refused_by_who_was_not_told(model, tmp_path):
    with System(model, tmp_path, vision_args=INT8) as system:
        assert answer(system)["error"]["code"] == "fingerprint_mismatch"
