"""Checkpoints that share a vision half share its embeddings: one store, one image, one encode."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import httpx2
import pytest

from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.rpc.client import VisionClient
from protos.lookonce.v1 import vision_pb2
from tests.checkpoint.towers import one_weight_changed, sharing, unsplit_of
from tests.images import photograph, save
from tests.lm import split
from tests.system.cluster import GatewayProcess, System
from tests.system.test_rollout import Pair, until
from tests.unsplit import Unsplit
from vision_service.app import load, running
from vision_service.images import Decoder, ImageLimits
from vision_service.settings import VisionSettings

FILE = save(photograph("coffee", (150, 100)), "PNG")
QUESTION = "What is it?"


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    return sharing(tmp_path_factory.mktemp("towers"))


@contextlib.asynccontextmanager
async def vision_of(model, store):
    """A client of a vision service in this process."""
    settings = VisionSettings(model=str(model), listen="127.0.0.1:0", dtype="float32", store=store)
    async with running(settings, load(settings)) as server:
        client = VisionClient(server.address)
        yield client
        await client.close()
        await server.grpc.stop(None)


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["plain", "quantised", "fine-tuned"], id="three"),
        pytest.param(
            ["plain", "renamed", "untied", "re-saved", "rope", "fine-tuned", "quantised"],
            id="seven",
            marks=pytest.mark.slow,
        ),
    ],
)
async def test_one_encode_serves_all_of_them_and_each_answers_as_its_own_model(towers, tmp_path, names):
    store, image = f"file://{tmp_path}/store", Decoder(ImageLimits()).decode(FILE)
    encodes, answers, references = 0, {}, set()
    for name in names:
        model = towers[name]
        async with vision_of(model, store) as vision:
            reference = (await vision.encode(vision_pb2.EncodeRequest(image=FILE))).reference
            encodes += (await vision.describe()).encodes
        references.add((reference.key, reference.fingerprint))
        question = split.asking(split.user(reference, QUESTION), max_tokens=6)
        async with split.running(model, tmp_path, store=store) as language:
            reply = await split.answer(language, question)
        assert reply.ids == Unsplit(unsplit_of(model)).answer_ids([("user", [image, QUESTION])], 6), name
        answers[name] = reply.text
    assert encodes == len(references) == 1
    assert {answers[name] for name in answers.keys() & {"plain", "renamed", "re-saved"}} == {answers["plain"]}
    models = answers.keys() - {"renamed", "untied", "re-saved"}
    assert len({answers[name] for name in models}) == len(models), "no answer tells the models apart"


async def test_a_tower_changed_in_one_weight_has_its_own_and_is_refused_by_the_others(towers, tmp_path):
    store, changed = f"file://{tmp_path}/store", one_weight_changed(towers["plain"], tmp_path / "changed")
    request, references = vision_pb2.EncodeRequest(image=FILE), []
    for model in (towers["plain"], changed):
        async with vision_of(model, store) as vision:
            references.append((await vision.encode(request)).reference)
            assert (await vision.describe()).encodes == 1
    own, other = references
    assert own.key != other.key and own.fingerprint != other.fingerprint
    async with split.running(towers["fine-tuned"], tmp_path, store=store) as language:
        assert (await split.answer(language, split.asking(split.user(own, QUESTION)))).ids
        for wrong in (other, replace(other, fingerprint=own.fingerprint)):
            with pytest.raises(LookonceError) as caught:
                await split.answer(language, split.asking(split.user(wrong, QUESTION)))
            assert caught.value.kind is ErrorKind.FINGERPRINT_MISMATCH


@pytest.mark.slow
def test_both_sides_of_an_a_b_test_share_one_encode(towers, tmp_path):
    """Real processes: an image uploaded once is answered by one variant, then by the other, then erased for both."""
    store, file = f"file://{tmp_path}/store", tmp_path / "variants"
    pairs = {"a": Pair(towers["plain"], store), "b": Pair(towers["fine-tuned"], store)}
    with contextlib.ExitStack() as stack:
        for pair in pairs.values():
            stack.callback(pair.close)
        file.write_text(pairs["a"].line("a", 1) + pairs["b"].line("b", 0))
        gateway = GatewayProcess("--variants-file", str(file), "--store", store)
        stack.callback(gateway.close)
        gateway.wait_ready()
        http = stack.enter_context(httpx2.Client(base_url=gateway.url, timeout=120))
        image = http.post("/v1/images", files={"file": FILE}).json()["id"]

        def ask():
            body = {"questions": [QUESTION], "max_tokens": 6, "temperature": 0}
            return http.post(f"/v1/images/{image}/questions", json=body).json()["answers"][0]

        first = ask()
        file.write_text(pairs["a"].line("a", 0) + pairs["b"].line("b", 1))
        until(lambda: ask()["receipt"]["variant"] == "b")
        second = ask()
        assert first["text"] != second["text"]
        assert first["receipt"]["fingerprint"] == second["receipt"]["fingerprint"]
        assert sum(System.describe(pair.vision).encodes for pair in pairs.values()) == 1
        assert http.delete(f"/v1/images/{image}").status_code in (200, 204)
        assert http.post("/v1/images", files={"file": FILE}).json()["id"] == image
        assert sum(System.describe(pair.vision).encodes for pair in pairs.values()) == 2
