"""The vision service as a real process over a real socket."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import urllib.request
from functools import partial

import grpc
import pytest
import torch
from PIL import Image
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.identity import embedding_key, image_digest, tenant_key
from lookonce.core.process import PERMANENT_EXIT
from lookonce.core.record import EMBEDDING, parse_record
from lookonce.core.rpc.client import VisionClient
from lookonce.models.checkpoint import Half, open_checkpoint
from lookonce.models.qwen2_vl.config import FAMILY
from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from lookonce.models.qwen2_vl.vision import Encoder
from lookonce.models.sizing import default_max_pixels
from lookonce.models.tensors import tensor_of
from protos.lookonce.v1 import vision_pb2
from tests.images import odd_files
from tests.ports import free_port
from tests.processes import ServiceProcess
from tests.unsplit import Unsplit
from tests.vision.conftest import in_process
from tests.vision.files import encoded, small
from vision_service.app import load, serve
from vision_service.images import Decoder, ImageLimits
from vision_service.settings import VisionSettings


def request(image, **fields):
    return vision_pb2.EncodeRequest(image=image, **fields)


async def refusal(call):
    with pytest.raises(LookonceError) as caught:
        await call
    return caught.value


VARIANTS = [("tiny", "published", True, 1), ("tiny", "nested", False, 3), ("small", "nested", True, 1)]


@pytest.mark.parametrize(("size", "layout", "tied", "shards"), VARIANTS)
async def test_embeddings_equal_the_unsplit_model_s_features(tmp_path, size, layout, tied, shards):
    path = make_random_checkpoint(tmp_path / "model", size=size, layout=layout, tied=tied, shards=shards)
    unsplit, decoder = Unsplit(path), Decoder(ImageLimits())
    files = odd_files()
    async with in_process(path) as client:
        results = await asyncio.gather(*(client.encode(request(f, with_tensors=True)) for f in files.values()))
    for data, result in zip(files.values(), results, strict=True):
        record = parse_record(result.record, result.reference.key)
        expected = unsplit.features(decoder.decode(data))
        torch.testing.assert_close(tensor_of(record.tensors[EMBEDDING]), expected, atol=1e-5, rtol=0)
        assert record.tokens == result.reference.tokens == len(expected)
        assert record.grid_thw == result.reference.grid_thw
        assert result.reference.record_bytes == len(result.record)


async def test_a_second_request_is_a_hit_with_the_same_bytes(client):
    first = await client.encode(request(small((1, 1, 1)), with_tensors=True))
    second = await client.encode(request(small((1, 1, 1)), with_tensors=True))
    assert (first.outcome, second.outcome) == ("miss", "hit")
    assert first.record == second.record == await client.fetch(first.reference.key)
    assert first.stored and second.stored
    assert first.timings.encode_ms > 0 and second.timings.encode_ms == 0


async def test_the_reference_is_what_anybody_can_derive(client, checkpoint_path):
    image = small((2, 2, 2))
    reference = (await client.encode(request(image))).reference
    checkpoint = open_checkpoint(str(checkpoint_path), needs=Half.VISION)
    description = await client.describe()
    assert reference.fingerprint == checkpoint.encoder_spec(description.model.dtype).fingerprint()
    assert reference.image_digest == image_digest(image)
    bounds = (checkpoint.min_pixels, default_max_pixels(FAMILY, checkpoint.max_pixels, "cpu"))
    assert reference.key == embedding_key(reference.image_digest, reference.fingerprint, *bounds)
    assert (reference.width, reference.height) == (32, 32)
    reference.check(partial(FAMILY.tokens_per_grid, checkpoint.config))


async def test_tenants_share_nothing(client):
    image = small((3, 3, 3))
    keys = [tenant_key("secret", name) for name in ("a", "b")]
    results = [await client.encode(request(image, tenant_key=key)) for key in [*keys, keys[0]]]
    assert [result.outcome for result in results] == ["miss", "miss", "hit"]
    assert results[0].reference.key != results[1].reference.key


async def test_fifty_at_once_are_encoded_once(client, noise):
    image = encoded(noise(300, 200))
    before = await client.describe()
    results = await asyncio.gather(*(client.encode(request(image, with_tensors=True)) for _ in range(50)))
    after = await client.describe()
    assert after.encodes - before.encodes == 1
    assert sum(result.outcome == "miss" for result in results) == 1
    assert len({result.record for result in results}) == 1


async def test_records_over_four_mebibytes_come_in_chunks(tmp_path, noise):
    path = make_random_checkpoint(tmp_path / "wide", size="tiny", hidden=1024, heads=8, kv_heads=2)
    async with in_process(path) as client:
        image = encoded(noise(1120, 1120))
        stub = client.stub.Encode(request(image, with_tensors=True), timeout=60)
        messages = [message async for message in stub]
        record = b"".join(message.chunk.data for message in messages[1:])
        assert messages[0].result.record == b"" and len(messages) > 5
        assert messages[0].result.record_bytes_to_follow == len(record) > 4 << 20
        assert parse_record(record, messages[0].result.reference.key).tokens == messages[0].result.reference.tokens
        assert (await client.encode(request(image, with_tensors=True))).record == record
        assert await client.fetch(messages[0].result.reference.key) == record


async def test_pixel_bounds_may_be_lowered(client, noise):
    image = encoded(noise(448, 448))
    full = await client.encode(request(image))
    low = await client.encode(request(image, max_pixels=100 * 784))
    assert low.reference.tokens <= 100 < full.reference.tokens
    assert low.reference.key != full.reference.key
    assert (await client.encode(request(image, max_pixels=100 * 784))).outcome == "hit"


async def test_a_min_enlarges_small_images_up_to_the_max(client, noise):
    image = encoded(noise(100, 75))
    own = await client.encode(request(image))
    large = await client.encode(request(image, min_pixels=150 * 784))
    both = await client.encode(request(image, min_pixels=150 * 784, max_pixels=200 * 784))
    assert own.reference.tokens < 150 <= large.reference.tokens == both.reference.tokens <= 200
    assert len({result.reference.key for result in (own, large, both)}) == 3
    assert (await client.encode(request(image, min_pixels=150 * 784))).outcome == "hit"
    assert (await client.forget(image_digests=[own.reference.image_digest])).forgotten == 3


@pytest.mark.parametrize(
    ("fields", "param", "limit"),
    [
        ({"max_pixels": 1 << 40}, "max_pixels", str(FAMILY.cpu_max_pixels)),
        ({"max_pixels": 783}, "max_pixels", "784"),
        ({"min_pixels": 0}, "min_pixels", "1"),
        ({"min_pixels": FAMILY.cpu_max_pixels + 1}, "min_pixels", str(FAMILY.cpu_max_pixels)),
        ({"min_pixels": 3000, "max_pixels": 1000}, "min_pixels", "1000"),
        ({"ttl": -1.0}, "ttl", "positive"),
        ({"ttl": float("nan")}, "ttl", "positive"),
        ({"tenant_key": b"short"}, "tenant_key", "32"),
    ],
)
async def test_bad_fields_are_named_with_their_limit(client, fields, param, limit):
    error = await refusal(client.encode(request(small(), **fields)))
    assert (error.kind, error.param) == (ErrorKind.INVALID_ARGUMENT, param)
    assert limit in error.message


async def test_bad_images_are_refused_and_not_kept(client):
    before = (await client.describe()).encodes
    for _ in range(2):
        assert (await refusal(client.encode(request(b"not an image")))).kind is ErrorKind.IMAGE_INVALID
    assert (await refusal(client.encode(request(bytes(21 << 20))))).kind is ErrorKind.PAYLOAD_TOO_LARGE
    assert (await client.describe()).encodes == before


async def test_a_deadline_is_demanded(client):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in client.stub.Encode(request(small())):
            pass
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "deadline" in caught.value.details()


async def test_fetch_of_an_unknown_key(client):
    assert (await refusal(client.fetch(bytes(32)))).kind is ErrorKind.EMBEDDING_MISSING
    assert (await refusal(client.fetch(b"short"))).kind is ErrorKind.INVALID_ARGUMENT


async def test_forget_by_key_and_by_image_with_every_bound(client, noise):
    image = encoded(noise(100, 100, seed=9))
    one = await client.encode(request(image))
    reply = await client.forget(keys=[one.reference.key])
    assert (reply.forgotten, reply.complete) == (1, True)
    variants = [
        await client.encode(request(image, **fields)) for fields in ({}, {"max_pixels": 7840}, {"max_pixels": 3136})
    ]
    assert [variant.outcome for variant in variants] == ["miss"] * 3
    reply = await client.forget(image_digests=[one.reference.image_digest])
    assert (reply.forgotten, reply.complete) == (3, True)
    for variant in variants:
        assert (await refusal(client.fetch(variant.reference.key))).kind is ErrorKind.EMBEDDING_MISSING
    assert (await refusal(client.forget(keys=[b"short"]))).param == "keys"


async def test_work_under_way_is_not_stored_after_forget(client, noise):
    image = encoded(noise(800, 800, seed=3), "BMP")
    running = asyncio.ensure_future(client.encode(request(image)))
    digest = image_digest(image)
    forgotten = 0
    while not running.done() and not forgotten:
        forgotten = (await client.forget(image_digests=[digest])).forgotten
    result = await running
    assert forgotten == 1
    assert result.reference.image_digest == digest  # the caller is answered all the same
    assert (await refusal(client.fetch(result.reference.key))).kind is ErrorKind.EMBEDDING_MISSING


async def test_forget_tells_when_a_store_could_not_be_reached(checkpoint_path):
    async with in_process(checkpoint_path, store="redis://127.0.0.1:1/0") as client:
        result = await client.encode(request(small()))
        assert result.outcome == "miss" and not result.stored
        assert (await client.encode(request(small()))).outcome == "hit"  # the memory in front of it
        assert not (await client.forget(keys=[result.reference.key])).complete
        assert (await client.encode(request(small()))).outcome == "miss"


@pytest.mark.slow  # system/test_faults holds it too, of a whole system
async def test_an_embedded_store_outlives_a_killed_process(checkpoint_path, tmp_path):
    store = f"file://{tmp_path}/store"
    with ServiceProcess(
        "vision_service", "--model", str(checkpoint_path), "--dtype", "float32", "--store", store
    ) as it:
        client = VisionClient(it.address)
        assert (await client.encode(request(small()))).outcome == "miss"
        await client.close()
        it.kill()
    async with in_process(checkpoint_path, store=store) as client:
        assert (await client.encode(request(small()))).outcome == "hit"


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  # any condition
            await asyncio.sleep(0.01)


def under_way():
    """Images in the works of the services in this process."""
    return REGISTRY.get_sample_value("lookonce_vision_images_under_way")


async def test_overload_is_told_at_once_and_hits_still_answer(checkpoint_path, decoding):
    async with in_process(checkpoint_path, max_waiting=1, decode_workers=1) as client:
        known = small()
        await client.encode(request(known))
        decoding.clear()
        running = [asyncio.ensure_future(client.encode(request(small((number, 0, 0))))) for number in range(6)]
        await until(lambda: sum(task.done() for task in running) == 5)
        assert (await client.encode(request(known))).outcome == "hit"
        decoding.set()
        results = await asyncio.gather(*running, return_exceptions=True)
    refused = [result for result in results if isinstance(result, LookonceError)]
    assert len(refused) == 5
    assert {error.kind for error in refused} == {ErrorKind.OVERLOADED}
    assert all(error.retry_after >= 1 for error in refused)


def page_at(listen):
    """What a process tells Prometheus."""
    with urllib.request.urlopen(f"http://{listen}/metrics", timeout=60) as reply:
        return reply.read().decode()


def values(page):
    """Name and value of each sample."""
    return {sample.name: sample.value for family in text_string_to_metric_families(page) for sample in family.samples}


async def test_metrics_over_http_and_sigterm_lets_accepted_work_end(checkpoint_path):
    listen = f"127.0.0.1:{free_port()}"
    with ServiceProcess("vision_service", "--model", str(checkpoint_path), "--metrics-listen", listen) as service:
        client = VisionClient(service.address)
        for _ in range(2):
            await client.encode(request(small()))
        await refusal(client.encode(request(b"x")))
        text = await asyncio.to_thread(page_at, listen)
        for line in ("encodes_total 1.0", "hits_total 1.0", "batch_patches_count 1.0"):
            assert f"lookonce_vision_{line}" in text
        assert 'lookonce_vision_errors_total{kind="image_invalid"} 1.0' in text

        images = [small((number, 0, 0), size=(700, 700)) for number in range(3)]
        running = [asyncio.ensure_future(client.encode(request(image))) for image in images]
        arrived = 0
        while arrived < 1 + 3:
            told = values(await asyncio.to_thread(page_at, listen))
            arrived = told["lookonce_vision_images_under_way"] + told["lookonce_vision_encodes_total"]
        service.process.terminate()
        results = await asyncio.gather(*running)
        assert [result.outcome for result in results] == ["miss"] * 3
        assert await asyncio.to_thread(service.wait_exit) == 0
        assert not os.path.exists(service.address.removeprefix("unix:"))  # noqa: ASYNC240
        await client.close()


async def test_a_client_that_goes_away_stops_its_work(checkpoint_path, decoding):
    async with in_process(checkpoint_path, decode_workers=1) as client:
        decoding.clear()
        running = [asyncio.ensure_future(client.encode(request(small((number, 0, 0))))) for number in range(8)]
        await until(lambda: under_way() == 8)
        for task in running:
            task.cancel()
        await until(lambda: under_way() == 0)
        await asyncio.gather(*running, return_exceptions=True)
        decoding.set()
        assert (await client.encode(request(small()))).outcome == "miss"
        assert (await client.describe()).encodes == 1


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"model": "/nowhere/at/all"}, "no such directory"),
        ({"device": "cuda:77"}, "cuda:77"),
        ({"store": "ftp://x"}, "scheme 'ftp' is not known"),
        ({"min_pixels": 99999999}, "above max_pixels"),
        ({"max_pixels": 783}, "--max-pixels='783': Input should be greater than or equal to 784"),
    ],
)
async def test_what_keeps_it_from_starting_is_told(checkpoint_path, fields, text):
    settings = VisionSettings(**({"model": str(checkpoint_path), "listen": "127.0.0.1:0"} | fields))
    with pytest.raises(LookonceError) as caught:
        await serve(settings, load(settings))
    assert text in caught.value.message


def start_failure(*args, listen=None, env=None):
    process = ServiceProcess("vision_service", *args, listen=listen, env=env)
    try:
        return process.wait_exit(), process.log
    finally:
        process.close()


def test_an_address_in_use_ends_the_process_with_one_line(checkpoint_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        status, log = start_failure("--model", str(checkpoint_path), listen=address)
    assert status == PERMANENT_EXIT
    assert log.splitlines()[-1] == f"vision: error: cannot listen on {address}: is the address in use?"
    lines = [line for line in log.splitlines() if '"event"' in line]
    assert len(lines) == 1 and f"cannot listen on {address}" in lines[0]
    assert "Traceback" not in log


def test_bad_settings_name_flag_and_variable(checkpoint_path):
    status, log = start_failure("--batch-wait-ms", "x", env={"LOOKONCE_VISION_BATCH_PATCHES": "many"})
    text = " ".join(log.split())
    assert status == 2
    assert "--model (or LOOKONCE_VISION_MODEL) is required" in text
    assert "LOOKONCE_VISION_BATCH_PATCHES='many'" in text and "--batch-wait-ms='x'" in text


async def test_a_forward_that_has_begun_is_ended_and_joined_although_its_caller_left(checkpoint_path, monkeypatch):
    begun, allowed, encode = threading.Event(), threading.Event(), Encoder.encode

    def wait_and_encode(self, batch, pause=lambda: None):
        begun.set()
        allowed.wait(60)
        return encode(self, batch, pause)

    monkeypatch.setattr(Encoder, "encode", wait_and_encode)
    allowed.set()
    async with in_process(checkpoint_path) as client:
        allowed.clear()
        begun.clear()
        try:
            request = vision_pb2.EncodeRequest(image=small((1, 2, 3)))
            with pytest.raises(LookonceError) as caught:
                await client.encode(request, timeout=1)
            assert caught.value.kind is ErrorKind.DEADLINE_EXCEEDED
            assert begun.is_set()
            await asyncio.sleep(0.3)  # the service has noticed, too
            again = asyncio.create_task(client.encode(request))
            await asyncio.sleep(0.3)
        finally:
            allowed.set()
        assert (await again).outcome == "coalesced"
        assert (await client.encode(request)).outcome == "hit"
        assert (await client.describe()).encodes == 1


async def test_a_cpu_makes_large_images_smaller_and_says_so(checkpoint_path):
    large = encoded(Image.new("RGB", (1400, 1000)), "JPEG")
    async with in_process(checkpoint_path, device="cpu") as client:
        assert (await client.describe()).max_pixels == FAMILY.cpu_max_pixels
        shrunk = await client.encode(vision_pb2.EncodeRequest(image=large))
        assert shrunk.reference.tokens <= FAMILY.cpu_max_pixels // 28**2
        assert "--max-pixels" in shrunk.notice
        assert (await client.encode(vision_pb2.EncodeRequest(image=large))).notice == shrunk.notice
        assert (await client.encode(vision_pb2.EncodeRequest(image=small()))).notice == ""
    async with in_process(checkpoint_path, device="cpu", max_pixels=2000 * 28**2) as client:
        whole = await client.encode(vision_pb2.EncodeRequest(image=large))
        assert (whole.notice, whole.reference.tokens) == ("", 50 * 36)
