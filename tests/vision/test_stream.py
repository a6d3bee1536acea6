"""EncodeStream: many images over one stream, a window, errors inside."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.record import parse_record
from lookonce.core.rpc.client import VisionClient
from protos.lookonce.v1 import common_pb2, vision_pb2
from tests.processes import ServiceProcess
from tests.vision.files import encoded, small
from vision_service.stream import EncodeWindow

WINDOW = 4


@pytest.fixture(scope="module")
def service(checkpoint_path):
    with ServiceProcess("vision_service", "--model", str(checkpoint_path), "--stream-window", str(WINDOW)) as process:
        yield process


def item(number, image, **fields):
    return vision_pb2.EncodeStreamRequest(id=number, request=vision_pb2.EncodeRequest(image=image, **fields))


async def feed(items):
    for one in items:
        yield one


async def test_every_image_is_answered_and_errors_do_not_end_it(client):
    images = {number: small((number, 7, 7)) for number in range(40)} | {5: b"rubbish", 11: b""}
    requests = feed(item(number, image, with_tensors=number == 3) for number, image in images.items())
    answers = {message.id: message async for message in client.encode_stream(requests, timeout=60)}
    assert answers.keys() == images.keys()
    for number, message in answers.items():
        bad = number in (5, 11)
        assert message.WhichOneof("payload") == ("error" if bad else "result")
        if bad:
            assert message.error.kind == common_pb2.IMAGE_INVALID and message.error.param == "image"
    assert (
        parse_record(answers[3].result.record, answers[3].result.reference.key).tokens
        == answers[3].result.reference.tokens
    )


async def test_the_window_is_told(client):
    told = asyncio.Event()

    async def nothing_until_told():  # metadata that come together with the status may be lost in grpc.aio's client
        await told.wait()
        for never in ():
            yield never

    call = client.stub.EncodeStream(nothing_until_told(), timeout=60)
    assert dict(await call.initial_metadata())["lookonce-window"] == str(WINDOW)
    told.set()
    assert [message async for message in call] == []


async def test_a_client_that_takes_no_answers_is_not_read_from():
    read = 0

    async def requests():
        nonlocal read
        for number in range(20):
            read += 1
            yield item(number, b"")

    async def answer(request):
        return "done"

    async with EncodeWindow(requests(), answer, WINDOW) as window:
        answers = aiter(window)
        for taken in range(1, 4):
            await anext(answers)
            for _ in range(100):
                await asyncio.sleep(0)
            assert read == taken - 1 + WINDOW  # the answer just handed out still counts
        assert len([answer async for answer in answers]) == 17
    assert read == 20


async def test_a_window_told_to_end_answers_what_it_has_read():
    released = asyncio.Event()

    async def requests():
        yield item(1, b"")
        await asyncio.sleep(60)

    async def answer(request):
        await released.wait()
        return "done"

    async with EncodeWindow(requests(), answer, WINDOW) as window:
        answers = aiter(window)
        first = asyncio.create_task(anext(answers))
        for _ in range(100):
            await asyncio.sleep(0)
        window.end()
        released.set()
        assert await first == (1, "done")
        with pytest.raises(LookonceError) as caught:
            await anext(answers)
        assert caught.value.kind is ErrorKind.UNAVAILABLE


async def test_an_id_used_twice_at_once_is_refused(client):
    slow = small((1, 2, 3), size=(1200, 1200))  # few bytes, much work: the other item is there long before it is done
    with pytest.raises(LookonceError) as caught:
        async for _ in client.encode_stream(feed([item(1, slow), item(1, small())]), timeout=60):
            pass
    assert (caught.value.kind, caught.value.param) == (ErrorKind.INVALID_ARGUMENT, "id")


async def test_an_id_may_come_again_once_answered(client):
    answered = asyncio.Event()

    async def requests():
        yield item(1, small((8, 1, 1)))
        await answered.wait()
        yield item(1, small((8, 1, 1)))

    outcomes = []
    async for message in client.encode_stream(requests(), timeout=60):
        outcomes.append(message.result.outcome)
        answered.set()
    assert outcomes == [vision_pb2.MISS, vision_pb2.HIT]


async def test_an_empty_stream_ends(client):
    assert [message async for message in client.encode_stream(feed([]), timeout=10)] == []


async def test_leaving_a_stream_stops_its_work(client, service, noise):
    images = [encoded(noise(500, 500, seed=seed), "BMP") for seed in range(20)]
    stream = client.encode_stream(feed(item(n, image) for n, image in enumerate(images)), timeout=60)
    await anext(stream)
    await stream.aclose()
    before = (await client.describe()).encodes
    await client.encode(vision_pb2.EncodeRequest(image=small((9, 9, 1))))
    assert (await client.describe()).encodes < before + 15


async def test_a_deadline_is_demanded(service):
    client = VisionClient(service.address)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in client.stub.EncodeStream(feed([])):
            pass
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    await client.close()
