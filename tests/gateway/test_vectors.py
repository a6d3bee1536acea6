"""What is kept of vectors, and what is not taken for another's."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from gateway.auth import Tenant
from gateway.conversation import Caller
from gateway.images.image_records import ImageRecord, ImageRecords
from gateway.images.image_store import StoreWithSpare
from gateway.images.vector_cache import MOST, Vector, VectorCache, VectorKey, vectors_key
from gateway.routing.replicas import Replicas
from gateway.routing.variants import Variant, Variants, VariantSpec
from gateway.vectors import VectorInput, VectorMaker, cut, similarity
from lookonce.core.stores import open_store
from protos.lookonce.v1 import language_pb2

RECORD = ImageRecord(bytes(range(32)), "one", 100, time.time(), time.time() + 600)


def vector(seed, rows=3):
    numbers = np.random.default_rng(seed).standard_normal((rows, 4)).astype(np.float32)
    return Vector(numbers / np.linalg.norm(numbers, axis=1, keepdims=True), 7 + seed, 5)


@pytest.fixture
def kept():
    return StoreWithSpare(*(open_store("memory://", namespace=name) for name in ("images", "spare")))


async def test_vectors_are_found_by_embedding_and_model_alone(kept):
    records, keys = ImageRecords(kept), [VectorKey(bytes([number]) * 32, "m") for number in range(MOST + 1)]
    await records.save(RECORD)
    cache = VectorCache(kept, records)
    for number, key in enumerate(keys):
        await cache.put(RECORD, key, vector(number, rows=1 + number))
    for number, key in enumerate(keys):
        found = await cache.get(RECORD, key)
        if number == 0:
            assert found is None  # the latest are kept
        else:
            assert np.array_equal(found.rows, vector(number, rows=1 + number).rows) and found.tokens == 7 + number
    assert await cache.get(RECORD, VectorKey(keys[2].embedding, "another")) is None
    await kept.store.put(vectors_key(RECORD.digest), b"\xff" * 40)
    assert await cache.get(RECORD, keys[2]) is None


async def test_a_vector_that_comes_after_its_images_erasure_is_not_kept(kept):
    records, key = ImageRecords(kept), VectorKey(bytes(32), "m")
    await records.save(RECORD)
    await records.bury(replace(RECORD, references={}), time.time())
    await VectorCache(kept, records).put(RECORD, key, vector(1))
    assert await kept.store.get(vectors_key(RECORD.digest)) is None


class Service:
    """A language service whose model may change."""

    address = "l"

    def __init__(self):
        self.model, self.asked = "old", []

    async def embed(self, request, timeout):
        self.asked += [item.parts[0].text for item in request.items]
        row = np.array([[1, 0] if self.model == "old" else [0, 1]], "<f4").tobytes()
        made = language_pb2.Vectors(rows=1, width=2, data=row, usage=language_pb2.Usage(prompt_tokens=3))
        results = [language_pb2.EmbedResult(vectors=made) for _ in request.items]
        return language_pb2.EmbedResponse(results=results, vector_model=self.model)


async def test_vectors_of_two_models_are_never_compared():
    service, caller = Service(), Caller(Tenant("one", bytes(32), bytes(32), bytes(32)))
    spec = VariantSpec("a", 1.0, ("v",), ("l",))
    variants = Variants([spec], lambda spec: Variant(spec, Replicas([]), Replicas([service])))
    maker = VectorMaker(SimpleNamespace(vectors=None), variants, reconnect_wait=0.0)
    query, document = VectorInput(("q",), query=True), VectorInput(("d",))
    assert (await maker.compare(query, [document], "old", caller)).scores == [1.0]
    again = await maker.compare(query, [document], "old", caller)
    assert again.kept == 2 and service.asked == ["q", "d"]
    service.model = "new"
    other = await maker.compare(query, [VectorInput(("e",))], "old", caller)
    assert other.scores == [1.0] and np.array_equal(other.query.rows, [[0, 1]])
    stranger = replace(caller, tenant=replace(caller.tenant, name="two"))
    assert (await maker.compare(query, [document], "new", stranger)).kept == 0


def test_maxsim_adds_up_the_best_of_each_token_and_a_cut_has_length_one():
    query, document = vector(1, rows=2), vector(2, rows=5)
    expected = sum(max(float(a @ b) for b in document.rows) for a in query.rows)
    assert similarity(query, document) == pytest.approx(expected, abs=1e-6)
    assert np.linalg.norm(cut(query, 2).rows, axis=1) == pytest.approx([1, 1], abs=1e-6)
