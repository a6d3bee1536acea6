"""The asynchronous client: the same names, the same answers."""

from __future__ import annotations

import asyncio
import inspect

import pytest

import lookonce
from lookonce import client as package
from lookonce.client import exceptions as errors
from tests.client.cutter import Cutter


@pytest.mark.parametrize("name", ["Client", "Image", "TextStream"])
def test_the_twins_have_the_same_names_and_parameters(name):
    blocking, twin = getattr(package, name), getattr(package, f"Async{name}")

    def shape(kind):
        public = {key: value for key, value in vars(kind).items() if not key.startswith("_")}
        return {
            key: [(one.name, one.default, one.kind) for one in inspect.signature(value).parameters.values()]
            for key, value in public.items()
            if inspect.isfunction(value)
        }

    assert shape(blocking) == shape(twin)
    assert shape(blocking)


async def test_everything_the_blocking_client_does(url, client, file):
    async with lookonce.AsyncClient(url) as gateway:
        image = await gateway.image(file)
        twin = client.image(file)
        assert image.id == twin.id
        whole = await image.ask("What is it?", max_tokens=12)
        stream = await image.ask("What is it?", stream=True, max_tokens=12)
        pieces = [piece async for piece in stream]
        assert "".join(pieces) == whole.text == twin.ask("What is it?", max_tokens=12).text
        assert (await stream.answer()).usage.completion_tokens == whole.usage.completion_tokens
        questions = [f"{number}?" for number in range(8)]
        reports: list[int] = []
        many = await image.ask_many(questions, max_tokens=3, progress=lambda done, total: reports.append(done))
        assert [answer.text for answer in many] == [answer.text for answer in twin.ask_many(questions, max_tokens=3)]
        assert reports == list(range(1, 9))
        arrived = {answer.id async for answer in image.ask_as_completed(questions, max_tokens=1)}
        assert arrived == {str(number) for number in range(8)}
        scores = await image.score("Red?", ["yes", "no"])
        assert scores == pytest.approx(twin.score("Red?", ["yes", "no"]), rel=1e-4)
        assert (await image.score_many(["Red?"], ["yes", "no"]))[0] == pytest.approx(scores, rel=1e-4)
        small = await gateway.image(file, max_pixels=784)
        assert small.id == image.id and small.tokens == (await small.ask("?", max_tokens=1)).usage.image_tokens == 1
        chat = await gateway.chat([{"role": "user", "content": [image, "What is it?"]}], max_tokens=12)
        assert chat.text == whole.text
        async with await gateway.chat("Hello", stream=True, max_tokens=50) as unread:
            pass
        assert unread.text == ""
        assert [model.id for model in await gateway.models()] == [model.id for model in client.models()]
        assert (await image.refresh()).status == "ready"
        assert (await image.delete()).complete
        with pytest.raises(errors.NotFoundError):
            await image.refresh()


async def test_questions_run_side_by_side(url, new_image):
    async with lookonce.AsyncClient(url) as gateway:
        image = await gateway.image(new_image())
        answers = await asyncio.gather(*(image.ask(f"{number}?", max_tokens=2) for number in range(12)))
        again = await image.ask_many([f"{number}?" for number in range(12)], max_tokens=2)
        assert [answer.text for answer in answers] == [answer.text for answer in again]


async def test_it_retries_and_does_not_begin_a_broken_stream_again(url, file):
    with Cutter(url, 0, None) as cutter:
        async with lookonce.AsyncClient(cutter.url) as gateway:
            image = await gateway.image(file)
        assert len(cutter.requests) == 2
    with Cutter(url, 900) as cutter:
        async with lookonce.AsyncClient(cutter.url) as gateway:
            stream = await gateway.chat("Tell all.", stream=True, max_tokens=200, temperature=1.2, seed=5)
            with pytest.raises(errors.StreamInterrupted) as caught:
                async for _ in stream:
                    pass
            assert caught.value.text == stream.text
        assert len(cutter.requests) == 1
        assert image.id
