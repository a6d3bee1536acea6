"""The three tiers, over a real embedded store and real sockets: what is found, refused, fetched again, erased."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from functools import partial

import pytest
import torch

from lm_service.embeddings import EmbeddingResolver, TensorCache
from lm_service.engine.packed.engine import rows_of
from lm_service.engine.types import EmbeddingSource
from lm_service.peers import VisionPeers
from lm_service.prompt import AcceptedEncoders
from lookonce.core.embedding_cache import EmbeddingCache
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.identity import EmbeddingReference
from lookonce.core.record import EMBEDDING, tensor_names
from lookonce.core.rpc.client import VisionClient
from lookonce.core.rpc.messages import chunks
from lookonce.core.rpc.server import Server, ServerOptions
from lookonce.core.stores import open_store
from lookonce.models.tensors import view_of
from protos.lookonce.v1 import vision_pb2, vision_pb2_grpc
from tests.faulty_proxy import FaultyProxy
from tests.lm.split import record_of
from tests.valkey import ValkeyServer

HIDDEN = 8
MINE, ALSO_MINE, THEIRS = "a" * 64, "b" * 64, "c" * 64


def reference(number=1, h=4, w=6, fingerprint=MINE):
    digest = bytes([number]) * 32
    return EmbeddingReference(bytes([number + 100]) * 32, fingerprint, digest, (1, h, w), h * w // 4, 30, 20)


def rows(wanted, hidden=HIDDEN):
    return torch.randn(wanted.tokens, hidden, generator=torch.Generator().manual_seed(wanted.key[0]))


def good(wanted):
    return record_of(wanted, rows(wanted))


class Peer(vision_pb2_grpc.VisionEncoderServicer):
    """A vision service that serves exactly the bytes it is given, sound or not."""

    def __init__(self, fingerprint=MINE):
        self.fingerprint = fingerprint
        self.records = {}
        self.fetches = 0
        self.asked = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()

    async def Describe(self, request, context):
        return vision_pb2.VisionDescription(fingerprint=self.fingerprint)

    async def Fetch(self, request, context):
        self.fetches += 1
        self.asked.set()
        await self.gate.wait()
        if request.key not in self.records:
            raise LookonceError(ErrorKind.EMBEDDING_MISSING, "gone")
        for piece in chunks(self.records[request.key]):
            yield piece


@contextlib.asynccontextmanager
async def serving(*peers):
    async with contextlib.AsyncExitStack() as stack:
        addresses = []
        for peer in peers:
            server = Server(ServerOptions("127.0.0.1:0"))
            vision_pb2_grpc.add_VisionEncoderServicer_to_server(peer, server.grpc)
            addresses.append(await server.start())
            stack.push_async_callback(server.grpc.stop, None)
        yield addresses


@contextlib.asynccontextmanager
async def resolving(
    directory, *peers, dtype=torch.float32, cache_bytes=1 << 20, addresses=(), url="", names=(EMBEDDING,)
):
    store = open_store(url or f"file://{directory}/store", strict=True)
    async with serving(*peers) as live:
        accepted = AcceptedEncoders([MINE, ALSO_MINE])
        clients = [VisionClient(address) for address in (*addresses, *live)]
        watch = VisionPeers(clients, accepted, fetch_timeout=10)
        resolver = EmbeddingResolver(
            tensors=TensorCache(cache_bytes),
            cache=EmbeddingCache(store),
            peers=watch,
            hidden_size=HIDDEN,
            accepted=accepted,
            names=names,
        )
        resolver.store = store
        load = resolver.load
        resolver.load = lambda wanted: load(wanted, partial(rows_of, device=torch.device("cpu"), dtype=dtype))
        try:
            yield resolver
        finally:
            await watch.close()
            await store.close()


async def refused(resolver, wanted):
    with pytest.raises(LookonceError) as caught:
        await resolver.load(wanted)
    assert len(resolver.tensors) == 0
    return caught.value


async def test_store_then_tensor_cache(tmp_path):
    async with resolving(tmp_path) as resolver:
        wanted = reference()
        await resolver.store.put(wanted.key, good(wanted).serialize())
        first, source = await resolver.load(wanted)
        assert (source, torch.equal(first, rows(wanted))) == (EmbeddingSource.STORE, True)
        await resolver.store.delete(wanted.key)
        again, source = await resolver.load(wanted)
        assert source is EmbeddingSource.TENSOR_CACHE
        assert again is first


async def test_lost_from_the_store_is_fetched_and_written_back(tmp_path):
    peer, wanted = Peer(), reference()
    peer.records[wanted.key] = good(wanted).serialize()
    async with resolving(tmp_path, peer) as resolver:
        got, source = await resolver.load(wanted)
        assert (source, torch.equal(got, rows(wanted))) == (EmbeddingSource.FETCHED, True)
        assert bytes(await resolver.store.get(wanted.key)) == peer.records[wanted.key]


async def test_a_record_over_many_chunks_is_fetched_whole(tmp_path):
    peer, wanted = Peer(), reference(h=600, w=600)
    peer.records[wanted.key] = good(wanted).serialize()
    assert len(peer.records[wanted.key]) > 2 << 20
    async with resolving(tmp_path, peer) as resolver:
        assert torch.equal((await resolver.load(wanted))[0], rows(wanted))


async def test_each_vision_service_is_asked_in_turn(tmp_path):
    empty, peer, wanted = Peer(), Peer(ALSO_MINE), reference()
    peer.records[wanted.key] = good(wanted).serialize()
    async with resolving(tmp_path, empty, peer, addresses=["127.0.0.1:1"]) as resolver:
        assert (await resolver.load(wanted))[1] is EmbeddingSource.FETCHED
    assert (empty.fetches, peer.fetches) == (1, 1)


async def test_nowhere_is_embedding_missing_and_may_pass_where_somebody_was_not_asked(tmp_path):
    async with resolving(tmp_path / "asked", Peer(), Peer(THEIRS)) as resolver:
        error = await refused(resolver, reference())
        assert (error.kind, error.retry_after) == (ErrorKind.EMBEDDING_MISSING, None)
    async with resolving(tmp_path / "away", Peer(), addresses=["127.0.0.1:1"]) as resolver:
        error = await refused(resolver, reference())
        assert error.kind is ErrorKind.EMBEDDING_MISSING and error.retry_after


async def test_what_could_not_be_looked_for_in_the_store_may_be_there(tmp_path):
    """The first failure tells it, long before a circuit breaker opens; what a peer has is answered all the same."""
    with ValkeyServer() as valkey, FaultyProxy(valkey.port) as proxy:
        async with resolving(tmp_path, Peer(), url=proxy.url) as resolver:
            error = await refused(resolver, reference())
            assert (error.kind, error.retry_after) == (ErrorKind.EMBEDDING_MISSING, None)
            await asyncio.to_thread(proxy.set, "half")
            error = await refused(resolver, reference())
            assert error.kind is ErrorKind.EMBEDDING_MISSING and error.retry_after
        peer, wanted = Peer(), reference()
        peer.records[wanted.key] = good(wanted).serialize()
        async with resolving(tmp_path, peer, url=proxy.url) as resolver:
            assert (await resolver.load(wanted))[1] is EmbeddingSource.FETCHED


async def test_a_damaged_record_in_the_store_is_dropped_and_fetched_again(tmp_path):
    peer, wanted = Peer(), reference()
    peer.records[wanted.key] = good(wanted).serialize()
    broken = bytearray(peer.records[wanted.key])
    broken[-1] ^= 1
    async with resolving(tmp_path, peer) as resolver:
        await resolver.store.put(wanted.key, bytes(broken))
        assert (await resolver.load(wanted))[1] is EmbeddingSource.FETCHED
        assert bytes(await resolver.store.get(wanted.key)) == peer.records[wanted.key]


def nan(wanted):
    values = rows(wanted)
    values[2, 3] = float("nan")
    return record_of(wanted, values)


BAD = {
    "not finite": nan,
    "too narrow": lambda wanted: record_of(wanted, rows(wanted, HIDDEN - 1)),
    "too wide": lambda wanted: record_of(wanted, rows(wanted, HIDDEN * 2)),
    "too few rows": lambda wanted: record_of(wanted, rows(wanted)[:-1]),
    "other grid": lambda wanted: record_of(wanted, rows(wanted), grid_thw=(1, 6, 4)),
    "other image": lambda wanted: record_of(wanted, rows(wanted), image_digest=bytes(32)),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
async def test_sound_bytes_that_do_not_fit_are_refused_everywhere(tmp_path, bad):
    wanted, peer = reference(), Peer()
    peer.records[wanted.key] = bad(wanted).serialize()
    async with resolving(tmp_path, peer) as resolver:
        assert (await refused(resolver, wanted)).kind is ErrorKind.EMBEDDING_INVALID
        assert not await resolver.store.contains(wanted.key), "what was refused is not written back"
        await resolver.store.put(wanted.key, bad(wanted).serialize())
        peer.records[wanted.key] = good(wanted).serialize()
        got, source = await resolver.load(wanted)
        assert (source, torch.equal(got, rows(wanted))) == (EmbeddingSource.FETCHED, True)


async def test_without_another_source_the_reason_is_told(tmp_path):
    async with resolving(tmp_path) as resolver:
        wanted = reference()
        await resolver.store.put(wanted.key, nan(wanted).serialize())
        error = await refused(resolver, wanted)
        assert (error.kind, "not finite" in error.message) == (ErrorKind.EMBEDDING_INVALID, True)


async def test_fetched_garbage_is_refused(tmp_path):
    wanted, peer = reference(), Peer()
    peer.records[wanted.key] = b"\x08" + bytes(300)
    async with resolving(tmp_path, peer) as resolver:
        assert (await refused(resolver, wanted)).kind is ErrorKind.EMBEDDING_INVALID


async def test_numbers_that_overflow_the_models_dtype_are_refused(tmp_path):
    wanted = reference()
    large = record_of(wanted, rows(wanted) * 1e6)
    async with resolving(tmp_path, dtype=torch.float16) as resolver:
        await resolver.store.put(wanted.key, large.serialize())
        assert (await refused(resolver, wanted)).kind is ErrorKind.EMBEDDING_INVALID


async def test_half_precision_records_are_cast(tmp_path):
    wanted = reference()
    half = replace(good(wanted), tensors={EMBEDDING: view_of(rows(wanted).bfloat16())})
    async with resolving(tmp_path) as resolver:
        await resolver.store.put(wanted.key, half.serialize())
        assert torch.equal((await resolver.load(wanted))[0], rows(wanted).bfloat16().float())


def stacked(wanted, **changes):
    """A record whose tensors are `image_embeds` and two of a deepstack, but for the changes; None leaves one out."""
    tensors = {name: rows(wanted) + number for number, name in enumerate(tensor_names(2))} | changes
    views = {name: view_of(tensor) for name, tensor in tensors.items() if tensor is not None}
    return replace(good(wanted), tensors=views)


async def test_the_tensors_of_a_deepstack_are_one_entry(tmp_path):
    wanted, other = reference(), reference(2)
    size = 3 * rows(wanted).nbytes
    async with resolving(tmp_path, names=tensor_names(2), cache_bytes=2 * size - 1) as resolver:
        for image in (wanted, other):
            await resolver.store.put(image.key, stacked(image).serialize())
        loaded, _ = await resolver.load(wanted)
        assert torch.equal(loaded, torch.stack([rows(wanted) + number for number in range(3)]))
        assert resolver.tensors.bytes == size
        await resolver.load(other)
        assert (len(resolver.tensors), resolver.tensors.bytes) == (1, size), "all tensors count"
        assert await resolver.forget([other.key], []) == (1, True)
        assert (await refused(resolver, other)).kind is ErrorKind.EMBEDDING_MISSING


@pytest.mark.parametrize(
    ("names", "changes"),
    [
        (tensor_names(2), {"deepstack.1": None}),
        (tensor_names(2), {"deepstack.2": torch.zeros(6, HIDDEN)}),
        (tensor_names(2), {"deepstack.0": None, "deepstack.00": torch.zeros(6, HIDDEN)}),
        (tensor_names(2), {"deepstack.1": torch.zeros(6, HIDDEN + 1)}),
        (tensor_names(2), {"deepstack.1": torch.full((6, HIDDEN), torch.nan)}),
        (tensor_names(), {}),
        (tensor_names(3), {}),
    ],
    ids=["missing", "surplus", "named otherwise", "wider", "not finite", "for another model", "too few"],
)
async def test_a_record_without_exactly_the_models_tensors_is_refused_and_dropped(tmp_path, names, changes):
    wanted, peer = reference(), Peer()
    peer.records[wanted.key] = stacked(wanted, **changes).serialize()
    async with resolving(tmp_path, peer, names=names) as resolver:
        await resolver.store.put(wanted.key, peer.records[wanted.key])
        assert (await refused(resolver, wanted)).kind is ErrorKind.EMBEDDING_INVALID
        assert await resolver.store.get(wanted.key) is None


async def test_a_record_by_another_encoder_is_refused_naming_both(tmp_path):
    wanted = reference()
    async with resolving(tmp_path) as resolver:
        await resolver.store.put(wanted.key, record_of(wanted, rows(wanted), fingerprint=THEIRS).serialize())
        error = await refused(resolver, wanted)
        assert error.kind is ErrorKind.FINGERPRINT_MISMATCH
        assert MINE in error.message
        assert THEIRS in error.message


async def test_a_reference_by_another_encoder_is_refused_before_any_work(tmp_path):
    peer = Peer()
    async with resolving(tmp_path, peer) as resolver:
        error = await refused(resolver, reference(fingerprint=THEIRS))
        assert error.kind is ErrorKind.FINGERPRINT_MISMATCH
    assert peer.fetches == 0


async def test_nothing_is_fetched_from_another_models_service_until_it_changes(tmp_path):
    wanted, peer = reference(), Peer(THEIRS)
    peer.records[wanted.key] = good(wanted).serialize()
    async with resolving(tmp_path, peer) as resolver:
        assert (await refused(resolver, wanted)).kind is ErrorKind.EMBEDDING_MISSING
        assert peer.fetches == 0
        await resolver.store.put(wanted.key, good(wanted).serialize())
        assert (await resolver.load(wanted))[1] is EmbeddingSource.STORE, "cached images still answer"
        peer.fingerprint = MINE
        await resolver._peers.peers[0].describe()
        other = reference(2)
        peer.records[other.key] = good(other).serialize()
        assert (await resolver.load(other))[1] is EmbeddingSource.FETCHED


async def test_simultaneous_loads_are_one(tmp_path):
    wanted, peer = reference(), Peer()
    peer.records[wanted.key] = good(wanted).serialize()
    async with resolving(tmp_path, peer) as resolver:
        loaded = await asyncio.gather(*(resolver.load(wanted) for _ in range(50)))
    assert peer.fetches == 1
    assert all(got is loaded[0][0] for got, _ in loaded)


async def test_one_who_leaves_does_not_spoil_it_for_the_others(tmp_path):
    wanted, peer = reference(), Peer()
    peer.records[wanted.key] = good(wanted).serialize()
    peer.gate.clear()
    async with resolving(tmp_path, peer) as resolver:
        leaving, staying = (asyncio.create_task(resolver.load(wanted)) for _ in range(2))
        await peer.asked.wait()
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        peer.gate.set()
        assert (await staying)[1] is EmbeddingSource.FETCHED
    assert peer.fetches == 1


async def test_a_load_that_nobody_waits_for_ends_and_a_new_one_starts(tmp_path):
    wanted, peer = reference(), Peer()
    peer.records[wanted.key] = good(wanted).serialize()
    peer.gate.clear()
    async with resolving(tmp_path, peer) as resolver:
        alone = asyncio.create_task(resolver.load(wanted))
        await peer.asked.wait()
        alone.cancel()
        following = asyncio.create_task(resolver.load(wanted))
        peer.gate.set()
        assert (await following)[1] is EmbeddingSource.FETCHED
        assert peer.fetches == 2


async def test_forget_erases_every_tier_and_what_is_under_way(tmp_path):
    kept, doomed, coming, peer = reference(1), reference(2), reference(3), Peer()
    peer.records[coming.key] = good(coming).serialize()
    peer.gate.clear()
    async with resolving(tmp_path, peer) as resolver:
        for one in (kept, doomed):
            await resolver.store.put(one.key, good(one).serialize())
            await resolver.load(one)
        waiting = asyncio.create_task(resolver.load(coming))
        await peer.asked.wait()
        assert await resolver.forget([], [doomed.image_digest, coming.image_digest]) == (1, True)
        with pytest.raises(LookonceError) as caught:
            await waiting
        assert caught.value.kind is ErrorKind.EMBEDDING_MISSING
        assert [await resolver.store.contains(one.key) for one in (kept, doomed, coming)] == [True, False, False]
        assert (await resolver.load(kept))[1] is EmbeddingSource.TENSOR_CACHE
        peer.gate.set()
        with pytest.raises(LookonceError):
            await resolver.load(doomed)


async def test_the_tensor_cache_keeps_within_its_bytes_least_recently_used_out_first(tmp_path):
    one, two, three = (reference(number) for number in (1, 2, 3))
    size = rows(one).nbytes
    async with resolving(tmp_path, cache_bytes=2 * size) as resolver:
        for wanted in (one, two, three):
            await resolver.store.put(wanted.key, good(wanted).serialize())
        await resolver.load(one)
        await resolver.load(two)
        await resolver.load(one)
        await resolver.load(three)
        assert resolver.tensors.bytes == 2 * size
        assert [(await resolver.load(wanted))[1] for wanted in (one, three)] == [EmbeddingSource.TENSOR_CACHE] * 2
        assert (await resolver.load(two))[1] is EmbeddingSource.STORE


async def test_the_tensor_cache_never_answers_for_a_reference_that_differs(tmp_path):
    wanted = reference()
    async with resolving(tmp_path) as resolver:
        await resolver.store.put(wanted.key, good(wanted).serialize())
        await resolver.load(wanted)
        for lie in (replace(wanted, grid_thw=(1, 6, 4)), replace(wanted, image_digest=bytes(32))):
            with pytest.raises(LookonceError) as caught:
                await resolver.load(lie)
            assert caught.value.kind is ErrorKind.EMBEDDING_INVALID
        assert (await resolver.load(wanted))[1] is EmbeddingSource.TENSOR_CACHE
        assert await resolver.store.contains(wanted.key), "a wrong reference does not delete a sound record"
