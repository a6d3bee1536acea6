"""A language half by itself, which nothing on its host tells of which vision weights its checkpoint has."""

from __future__ import annotations

import contextlib
import json

import pytest

from lm_service.prompt import AcceptedEncoders
from lm_service.settings import LanguageSettings
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.rpc.client import VisionClient
from lookonce.models.checkpoint import Half, open_checkpoint
from lookonce.models.checkpoint.split import split_checkpoint
from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from protos.lookonce.v1 import common_pb2, language_pb2, vision_pb2
from tests.images import photograph, save
from tests.lm.split import answer, asking, running, user
from vision_service.app import load
from vision_service.app import running as running_vision
from vision_service.settings import VisionSettings

FILE = save(photograph("coffee", (150, 100)), "PNG")


@pytest.fixture(scope="module")
def halves(checkpoint_path, tmp_path_factory):
    """Of a split by 0.3, which stated the source's identity only."""
    out = tmp_path_factory.mktemp("split") / "out"
    split_checkpoint(str(checkpoint_path), out)
    for half in Half:
        stated = json.loads((out / half / "lookonce.json").read_text())
        del stated["vision_weights"]
        (out / half / "lookonce.json").write_text(json.dumps(stated | {"format": 1}))
    assert open_checkpoint(str(out / "language")).vision_weights is None
    return out


@contextlib.asynccontextmanager
async def vision_at(address, model):
    settings = VisionSettings(model=str(model), listen=address, dtype="float32")
    async with running_vision(settings, load(settings)) as server:
        client = VisionClient(address)
        yield client
        await client.close()
        await server.grpc.stop(None)


async def refused(client, request):
    with pytest.raises(LookonceError) as caught:
        await answer(client, request)
    assert caught.value.kind is ErrorKind.FINGERPRINT_MISMATCH
    return caught.value.message


async def test_it_is_told_by_a_vision_service_of_the_same_checkpoint_before_the_first_image(
    halves, checkpoint_path, tower, tmp_path
):
    address = f"unix:{tmp_path}/vision.sock"
    async with running(halves / "language", tmp_path, vision=address) as language:
        assert list((await language.describe()).fingerprints) == []
        untold = asking(user(tower.record(photograph("coffee", (150, 100)).convert("RGB"))[0], "What?"))
        assert "takes none yet: only the language half is here" in await refused(language, untold)
        assert (await answer(language, asking(user("Hello")))).ids
        async with vision_at(address, halves / "vision") as vision:
            reference = (await vision.encode(vision_pb2.EncodeRequest(image=FILE))).reference
            told = await answer(language, asking(user(reference, "What?")))
            fingerprints = set((await language.describe()).fingerprints)
            assert tower.fingerprint in fingerprints and len(fingerprints) == 3
        assert (await answer(language, asking(user(reference, "What?")))).ids == told.ids  # and is not forgotten


async def test_scores_and_descriptions_wait_for_it_too(halves, tmp_path):
    async with vision_at(f"unix:{tmp_path}/vision.sock", halves / "vision") as vision:
        reference = (await vision.encode(vision_pb2.EncodeRequest(image=FILE))).reference
        async with running(halves / "language", tmp_path, vision=vision.address) as language:
            item = language_pb2.ScoreItem(messages=[user(reference, "Cup?")], choices=["yes", "no"])
            reply = await language.score(language_pb2.ScoreRequest(items=[item]), timeout=60)
            assert [entry.choice for entry in reply.results[0].scores.choices] == ["yes", "no"]
        async with running(halves / "language", tmp_path, vision=vision.address) as language:
            assert reference.fingerprint in (await language.describe()).fingerprints


async def test_another_checkpoint_s_vision_service_tells_it_nothing(halves, tmp_path):
    other = make_random_checkpoint(tmp_path / "other", seed=3)
    async with vision_at(f"unix:{tmp_path}/vision.sock", other) as vision:
        reference = (await vision.encode(vision_pb2.EncodeRequest(image=FILE))).reference
        async with running(halves / "language", tmp_path, vision=vision.address) as language:
            await refused(language, asking(user(reference, "What?")))
            assert list((await language.describe()).fingerprints) == []


@pytest.mark.parametrize("wrong", ["checkpoint", "weights", "no digest", "fingerprint", "silent"])
def test_only_what_fits_is_believed(halves, checkpoint_path, wrong):
    whole, language = open_checkpoint(str(checkpoint_path)), open_checkpoint(str(halves / "language"))
    right = vision_pb2.VisionDescription(
        model=common_pb2.ModelDescription(checkpoint=whole.identity, vision_weights=whole.vision_weights),
        fingerprint=whole.encoder_spec("float32").fingerprint(),
    )
    said = vision_pb2.VisionDescription()
    said.CopyFrom(right)
    if wrong == "checkpoint":
        said.model.checkpoint = "blake3:" + "0" * 64
    elif wrong == "fingerprint":  # of another dtype than is accepted, or of a version that counts otherwise
        said.fingerprint = whole.encoder_spec("float16").fingerprint()
    else:
        said.model.vision_weights = {"weights": "blake3:" + "0" * 64, "no digest": "blake3:", "silent": ""}[wrong]
    accepted = AcceptedEncoders.of(language, "float32")
    accepted.learn(said)
    assert not accepted.are_known and accepted.fingerprints == ()
    accepted.learn(right)
    assert accepted.fingerprints == (right.fingerprint,)
    accepted.learn(said)
    assert accepted.fingerprints == (right.fingerprint,), "what is known is not told again"


async def test_a_setting_tells_it(halves, checkpoint_path, tower, tmp_path):
    weights = open_checkpoint(str(checkpoint_path)).vision_weights
    async with running(halves / "language", tmp_path, encoder_weights=weights, encoder_dtype="float32") as language:
        assert list((await language.describe()).fingerprints) == [tower.fingerprint]
    with pytest.raises(ValueError, match="encoder_weights"):
        LanguageSettings(model="m", encoder_weights="blake3:short")
