"""Every bound of a request, refused by name and limit."""

from __future__ import annotations

import math

import pytest

from lm_service.engine.types import Sampling
from lm_service.wire import check_forget, check_ids, check_items, choices_of, messages_of, sampling_of, timeout_of
from lookonce.core.errors import ErrorKind, LookonceError
from protos.lookonce.v1 import common_pb2, language_pb2


def parse(**wanted):
    return sampling_of(language_pb2.SamplingParameters(**wanted), max_tokens=100)


def test_nothing_asked_for_is_greedy_up_to_the_bound():
    assert parse() == Sampling(max_tokens=100)


def test_everything_asked_for_arrives():
    wanted = {"max_tokens": 7, "temperature": 0.5, "top_p": 0.25, "top_k": 9, "min_p": 0.125, "repetition_penalty": 1.5}
    wanted |= {"presence_penalty": -0.5, "frequency_penalty": 0.75, "seed": 2**63 + 5, "stop": ("a", "b"), "n": 3}
    wanted |= {"ignore_eos": True, "logprobs": 4, "min_tokens": 5}
    assert parse(**wanted) == Sampling(**wanted)


@pytest.mark.parametrize(
    ("wanted", "param", "limit"),
    [
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": 5, "min_tokens": 6}, "min_tokens", "at most max_tokens, 5, got 6"),
        ({"temperature": -0.1}, "temperature", "0 to 2"),
        ({"temperature": 2.1}, "temperature", "0 to 2"),
        ({"temperature": math.nan}, "temperature", "0 to 2"),
        ({"temperature": math.inf}, "temperature", "0 to 2"),
        ({"top_p": 0.0}, "top_p", "above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p", "above 0 and at most 1"),
        ({"min_p": -0.1}, "min_p", "0 to 1"),
        ({"min_p": 1.1}, "min_p", "0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty", "above 0 and at most 10"),
        ({"presence_penalty": 2.5}, "presence_penalty", "-2 to 2"),
        ({"frequency_penalty": -2.5}, "frequency_penalty", "-2 to 2"),
        ({"logprobs": 21}, "logprobs", "0 to 20"),
        ({"n": 17}, "n", "1 to 16"),
        ({"stop": ["x"] * 17}, "stop", "16 strings, got 17"),
        ({"stop": ["ok", ""]}, "stop[1]", "1 to 256"),
        ({"stop": ["x" * 257]}, "stop[0]", "1 to 256"),
    ],
)
def test_sampling_bounds(wanted, param, limit):
    with pytest.raises(LookonceError) as caught:
        parse(**wanted)
    assert (caught.value.kind, caught.value.param) == (ErrorKind.INVALID_ARGUMENT, param)
    assert limit in caught.value.message


def test_more_tokens_than_there_can_be_are_as_many_as_there_can_be():
    assert parse(max_tokens=101).max_tokens == parse(max_tokens=2**32 - 1).max_tokens == 100
    assert parse(max_tokens=2**32 - 1, min_tokens=2**32 - 1).min_tokens == 2**32 - 1


def text(words="hi"):
    return language_pb2.Message(role="user", parts=[language_pb2.Part(text=words)])


@pytest.mark.parametrize(
    ("messages", "kind", "words"),
    [
        ([text()] * 1025, ErrorKind.INVALID_ARGUMENT, "1024 messages, got 1025"),
        ([language_pb2.Message(parts=[language_pb2.Part(text="x")] * 4097)], ErrorKind.INVALID_ARGUMENT, "4096 parts"),
        ([text("x" * 4_000_001)], ErrorKind.PAYLOAD_TOO_LARGE, "4000000 characters"),
        ([language_pb2.Message(parts=[language_pb2.Part()])], ErrorKind.INVALID_ARGUMENT, "neither text nor an image"),
    ],
)
def test_conversation_bounds(messages, kind, words):
    with pytest.raises(LookonceError, match=words) as caught:
        messages_of(messages)
    assert caught.value.kind is kind


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ([], "1 to 64 strings, got 0"),
        ([str(i) for i in range(65)], "1 to 64 strings, got 65"),
        (["yes", ""], r"choices\[1\] must have 1 to 1024"),
        (["x" * 1025], r"choices\[0\] must have 1 to 1024"),
        (["yes", "no", "yes"], "differ"),
    ],
)
def test_choice_bounds(choices, words):
    with pytest.raises(LookonceError, match=words):
        choices_of(language_pb2.ScoreItem(choices=choices))


@pytest.mark.parametrize("count", [0, 1025])
def test_item_bounds(count):
    with pytest.raises(LookonceError, match="items must be 1 to 1024"):
        check_items([language_pb2.ScoreItem()] * count)


def test_the_text_of_all_items_is_bounded_together():
    items = [language_pb2.ScoreItem(messages=[text("x" * 20_000)], choices=["yes", "n" * 1000])] * 191
    with pytest.raises(LookonceError, match="4000000 characters in all, got 4011573: ask in several") as caught:
        check_items(items)
    assert (caught.value.kind, caught.value.param) == (ErrorKind.PAYLOAD_TOO_LARGE, "items")
    check_items(items[:190])


def test_the_shortest_time_counts():
    request = language_pb2.GenerateRequest(timeout=5)
    assert timeout_of(request, 9.0, 60.0) == 5
    assert timeout_of(request, 2.0, 60.0) == 2
    assert timeout_of(request, 9.0, 1.0) == 1
    assert timeout_of(language_pb2.GenerateRequest(), None, 60.0) == 60
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(LookonceError, match="timeout"):
            timeout_of(language_pb2.GenerateRequest(timeout=wrong), None, 60.0)


def test_names_and_keys_are_bounded():
    for size in (1, 31, 33):
        with pytest.raises(LookonceError, match=f"32 bytes or empty, got {size}"):
            check_ids(language_pb2.ScoreRequest(cache_salt=bytes(size)))
    check_ids(language_pb2.GenerateRequest(cache_salt=bytes(32)))
    with pytest.raises(LookonceError, match="client may have 256"):
        check_ids(language_pb2.ScoreRequest(client="x" * 257))
    with pytest.raises(LookonceError, match="keys must be 32 bytes"):
        check_forget(common_pb2.ForgetRequest(keys=[b"short"]))
    with pytest.raises(LookonceError, match="image_digests may hold 10000"):
        check_forget(common_pb2.ForgetRequest(image_digests=[bytes(32)] * 10_001))
