"""The parts without I/O: events from any pieces of bytes, questions in requests of bounded size."""

from __future__ import annotations

import json
from itertools import pairwise

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lookonce.client import AsyncClient, Client
from lookonce.client.calls import batches
from lookonce.client.connection import EventReader
from lookonce.client.exceptions import StreamInterrupted

EVENTS = st.lists(st.dictionaries(st.text(max_size=3), st.text(st.characters(codec="utf-8")), max_size=2), max_size=5)


@given(EVENTS, st.sampled_from(["\n", "\r\n"]), st.lists(st.integers(0, 400), max_size=8))
def test_events_survive_any_cut_and_any_character(events, newline, cuts):
    parts = [f"data: {json.dumps(event, ensure_ascii=False)}{newline}{newline}" for event in events]
    body = "".join([f": comment{newline}", *parts, f"data: [DONE]{newline}{newline}"]).encode()
    places = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]
    reader = EventReader()
    read = [event for a, b in pairwise(places) for event in reader.feed(body[a:b])]
    assert read == events
    reader.end()


@pytest.mark.parametrize("body", [b"", b"data: {}\n\n", b'data: {"a": 1}\n\ndata: [DONE]\n'])
def test_an_end_without_done_is_an_interruption(body):
    reader = EventReader()
    reader.feed(body)
    with pytest.raises(StreamInterrupted):
        reader.end()


@pytest.mark.parametrize("data", [b"{", b"[]", b"7", b"\xff"])
def test_an_event_that_is_no_object_is_an_interruption(data):
    with pytest.raises(StreamInterrupted):
        EventReader().feed(b"data: " + data + b"\n\n")


def test_requests_stay_within_the_limits_of_the_gateway():
    sizes = [len(batch.questions) for batch in batches("img", ["?"] * 2500, {})]
    assert sizes == [1000, 1000, 500]
    assert [batch.first for batch in batches("img", ["?"] * 2500, {})] == [0, 1000, 2000]
    long = batches("img", ["x" * 400_000] * 5, {"system": "y" * 100_000})
    assert [len(batch.questions) for batch in long] == [2, 2, 1]


def test_answers_find_their_question_again():
    second = batches("img", ["?"] * 1002, {})[1]
    place, answer = second.answer({"id": "1", "text": "t"})
    assert (place, answer.id, answer.text) == (1001, "1001", "t")
    second.check(2)
    with pytest.raises(StreamInterrupted, match="1 of 2"):
        second.check(1)


async def test_an_image_may_be_given_under_its_former_name():
    identifier = "img_" + 52 * "a"
    transport = httpx2.MockTransport(lambda request: httpx2.Response(200, json={"id": request.url.path[-56:]}))
    client = Client(http_client=httpx2.Client(transport=transport))
    with client, pytest.warns(DeprecationWarning, match="source=") as warned:
        assert client.image(picture=identifier).id == identifier
    async with AsyncClient(http_client=httpx2.AsyncClient(transport=transport)) as client:
        with pytest.warns(DeprecationWarning, match="source=") as warned_too:
            assert (await client.image(picture=identifier)).id == identifier
    assert warned[0].filename == warned_too[0].filename == __file__
