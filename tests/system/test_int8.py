"""Both services on int8 weights: they answer together; a language service that was not told refuses the embeddings."""

from __future__ import annotations

import pytest

from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.rpc.client import VisionClient
from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from protos.lookonce.v1 import vision_pb2
from tests.images import photograph, save
from tests.lm import split
from tests.system.cluster import System
from vision_service.app import load, running
from vision_service.settings import VisionSettings

INT8 = ("--quantization", "int8")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_random_checkpoint(tmp_path_factory.mktemp("int8") / "model", max_pixels=100 * 28 * 28)


def answer(system):
    image = system.upload(save(photograph("coffee", (150, 100)), "PNG"))["id"]
    return system.ask(image, ["What is it?"], max_tokens=4, temperature=0)[0]


async def test_a_language_service_takes_what_it_was_told_and_refuses_the_rest(model, tmp_path):
    """Both services in this process."""
    store, file = f"file://{tmp_path}/store", save(photograph("coffee", (150, 100)), "PNG")
    settings = VisionSettings(model=str(model), listen="127.0.0.1:0", dtype="float32", store=store, quantization="int8")
    async with running(settings, load(settings)) as server:
        vision = VisionClient(server.address)
        reference = (await vision.encode(vision_pb2.EncodeRequest(image=file))).reference
        question = split.asking(split.user(reference, "What is it?"), max_tokens=4)
        told = {"store": store, "vision": server.address, "quantization": "int8"}
        (tmp_path / "told").mkdir()
        async with split.running(model, tmp_path / "told", encoder_quantization="int8", **told) as language:
            reply = await split.answer(language, question)
            assert reply.ids and reply.finish.receipt.fingerprint == reference.fingerprint
        async with split.running(model, tmp_path, **told) as language:
            with pytest.raises(LookonceError) as caught:
                await split.answer(language, question)
        assert caught.value.kind is ErrorKind.FINGERPRINT_MISMATCH
        await vision.close()
        await server.grpc.stop(None)


@pytest.mark.slow
def test_halves_in_int8_answer_together(model, tmp_path):
    told = (*INT8, "--encoder-quantization", "int8")
    with System(model, tmp_path, vision_args=INT8, language_args=told) as system:
        found = answer(system)
        assert found["text"] and found["receipt"]["fingerprint"] == system.describe(system.visions[0]).fingerprint


@pytest.mark.slow
def test_embeddings_in_int8_are_refused_by_who_was_not_told(model, tmp_path):
    with System(model, tmp_path, vision_args=INT8) as system:
        assert answer(system)["error"]["code"] == "fingerprint_mismatch"
