"""An update after which fingerprints are counted otherwise: the old and the new meet in one store and at one gateway,
and neither ever takes the other's embeddings for its own."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import asdict

import httpx2
import pytest
from blake3 import blake3

from lookonce.core.embedding_cache import EmbeddingCache
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.identity import EncoderSpec, canonical_json
from lookonce.core.rpc.client import VisionClient
from lookonce.core.stores import open_store
from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from protos.lookonce.v1 import vision_pb2
from tests.images import photograph, save
from tests.lm import split
from tests.system.cluster import GatewayProcess
from vision_service.app import load, running
from vision_service.settings import VisionSettings

FILE = save(photograph("coffee", (150, 100)), "PNG")
QUESTION = "What is it?"
NEW = EncoderSpec.fingerprint


def old(self):
    """As 0.3 counted: over the identity of the checkpoint."""
    fields = asdict(self) | {"record_schema": 2, "preprocessing": 1}
    fields["checkpoint"] = fields.pop("vision_weights")
    return blake3(canonical_json(fields), derive_key_context="lookonce 2026 encoder fingerprint").hexdigest()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_random_checkpoint(tmp_path_factory.mktemp("update") / "model", max_pixels=100 * 28 * 28)


@pytest.fixture
def place(model, tmp_path, monkeypatch):
    """Starts halves that count in one way or the other, at one pair of addresses and on one store."""

    @contextlib.asynccontextmanager
    async def vision(counted):
        monkeypatch.setattr(EncoderSpec, "fingerprint", counted)
        address = f"unix:{tmp_path}/vision.sock"
        settings = VisionSettings(model=str(model), listen=address, dtype="float32", store=f"file://{tmp_path}/store")
        async with running(settings, load(settings)) as server:
            client = VisionClient(address)
            yield client
            await client.close()
            await server.grpc.stop(None)

    def language(counted):
        monkeypatch.setattr(EncoderSpec, "fingerprint", counted)
        return split.running(model, tmp_path, store=f"file://{tmp_path}/store", vision=f"unix:{tmp_path}/vision.sock")

    return vision, language


@pytest.mark.slow
async def test_halves_of_two_versions_refuse_each_other_and_their_embeddings_lie_side_by_side(place, tmp_path):
    vision, language = place
    references = {}
    for counted in (old, NEW):
        async with vision(counted) as client:
            references[counted] = (await client.encode(vision_pb2.EncodeRequest(image=FILE))).reference
            assert (await client.describe()).encodes == 1, "the other's was not found"
    assert references[old].key != references[NEW].key
    for counted, other in ((old, NEW), (NEW, old)):
        async with language(counted) as client:
            assert (await split.answer(client, split.asking(split.user(references[counted], QUESTION)))).ids
            with pytest.raises(LookonceError) as caught:
                await split.answer(client, split.asking(split.user(references[other], QUESTION)))
            assert caught.value.kind is ErrorKind.FINGERPRINT_MISMATCH


async def test_an_old_record_under_a_new_key_is_a_miss(place, tmp_path):
    vision, _ = place
    async with vision(old) as client:
        before = (await client.encode(vision_pb2.EncodeRequest(image=FILE, with_tensors=True))).record
    async with vision(NEW) as client:
        key = (await client.encode(vision_pb2.EncodeRequest(image=FILE))).reference.key
    store = open_store(f"file://{tmp_path}/store")
    await store.put(key, before)
    assert await EmbeddingCache(store).get(key) is None
    await store.put(key, before)
    await store.close()
    async with vision(NEW) as client:
        assert (await client.encode(vision_pb2.EncodeRequest(image=FILE))).outcome == "miss"
        assert (await client.describe()).encodes == 1


@pytest.mark.slow
async def test_images_of_before_are_answered_after_the_update_by_one_encode_each(place, tmp_path):
    """In between, with one half of either version, there is no answer rather than a wrong one."""
    vision, language = place

    async def ask(image):
        body = {"questions": [QUESTION], "max_tokens": 6, "temperature": 0}
        return (await http.post(f"/v1/images/{image}/questions", json=body)).json()["answers"][0]

    async with contextlib.AsyncExitStack() as stack:
        halves = await stack.enter_async_context(contextlib.AsyncExitStack())
        await halves.enter_async_context(vision(old))
        await halves.enter_async_context(language(old))
        addresses = ("--vision", f"unix:{tmp_path}/vision.sock", "--lm", f"unix:{tmp_path}/lm.sock")
        gateway = GatewayProcess(*addresses, "--store", f"file://{tmp_path}/gateway")
        stack.callback(gateway.close)
        await asyncio.to_thread(gateway.wait_ready)
        http = await stack.enter_async_context(httpx2.AsyncClient(base_url=gateway.url, timeout=60))
        image = (await http.post("/v1/images", files={"file": FILE})).json()["id"]
        before = await ask(image)
        await halves.aclose()
        other = save(photograph("chelsea", (100, 150)), "PNG")
        async with vision(NEW), language(old):
            assert (await ask(image))["text"] == before["text"], "from the embedding of before"
            other = (await http.post("/v1/images", files={"file": other})).json()["id"]
            assert (await ask(other))["error"]["code"] == "fingerprint_mismatch"
        async with vision(old), language(NEW):
            assert (await ask(image))["error"]["code"] == "fingerprint_mismatch"
        async with vision(NEW) as client, language(NEW):
            after = await ask(image)
            assert (await client.describe()).encodes == 1
            assert "error" not in await ask(other)
            assert (await client.describe()).encodes == 1, "encoded when the new vision service was first there"
    assert after["text"] == before["text"]
    assert after["receipt"]["fingerprint"] != before["receipt"]["fingerprint"]
