"""The embedding record: what is written is read, and nothing else is."""

from __future__ import annotations

import dataclasses
import json
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize

from lookonce.core.errors import RecordError
from lookonce.core.record import EMBEDDING, ITEM_BYTES, EmbeddingRecord, TensorView, parse_record
from tests.stores.records import make_record

KEY = bytes(32)


@st.composite
def records(draw) -> EmbeddingRecord:
    tokens = draw(st.integers(1, 6))
    names = [EMBEDDING, *draw(st.lists(st.from_regex(r"[a-z_]{1,12}\Z"), max_size=3, unique=True))]
    tensors = {}
    for name in names:
        dtype, hidden = draw(st.sampled_from(sorted(ITEM_BYTES))), draw(st.integers(1, 9))
        size = tokens * hidden * ITEM_BYTES[dtype]
        tensors[name] = TensorView(dtype, (tokens, hidden), memoryview(draw(st.binary(min_size=size, max_size=size))))
    grid = draw(st.tuples(*[st.integers(1, 1000)] * 3))
    width, height = draw(st.integers(1, 10**6)), draw(st.integers(1, 10**6))
    digest = draw(st.binary(min_size=32, max_size=32))
    return EmbeddingRecord(KEY, digest[::-1].hex(), digest, grid, width, height, tokens, tensors)


@settings(max_examples=60, deadline=None)
@given(records())
def test_round_trip(record):
    value = record.serialize()
    parsed = parse_record(value, KEY)
    assert parsed == dataclasses.replace(record, tensors=dict(sorted(record.tensors.items())))
    assert parsed.serialize() == value
    assert all(view.data.readonly for view in parsed.tensors.values())


@settings(max_examples=150, deadline=None)
@given(records(), st.data())
def test_truncated_or_flipped_is_a_record_error(record, data):
    value = bytearray(record.serialize())
    with pytest.raises(RecordError):
        parse_record(value[: data.draw(st.integers(0, len(value) - 1))], KEY)
    position = data.draw(st.integers(0, len(value) - 1))
    value[position] ^= 1 << data.draw(st.integers(0, 7))
    try:
        damaged = parse_record(value, KEY)
    except RecordError:
        return
    assert damaged == dataclasses.replace(record, tensors=dict(sorted(record.tensors.items()))), (
        "only padding may differ"
    )


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300))
def test_noise_is_a_record_error(value):
    with pytest.raises(RecordError):
        parse_record(value, KEY)
    with pytest.raises(RecordError):
        parse_record(struct.pack("<Q", len(value)) + value, KEY)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from([EMBEDDING, "__metadata__", "x"]), json_values))
def test_any_json_header_is_a_record_error(header):
    text = json.dumps(header).encode()
    with pytest.raises(RecordError):
        parse_record(struct.pack("<Q", len(text)) + text + bytes(64), KEY)


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 60_000,
        b'{"x":' * 12_000,
        b'{"__metadata__": {}, "x": NaN}',
        b'{"__metadata__": {"schema": 1}}',
        b"\xff{}",
    ],
)
def test_hostile_headers_are_a_record_error(text):
    with pytest.raises(RecordError):
        parse_record(struct.pack("<Q", len(text)) + text, KEY)


def test_it_is_safetensors():
    record = make_record(deepstack=2)
    tensors = dict(deserialize(record.serialize()))
    assert set(tensors) == {EMBEDDING, "deepstack_0", "deepstack_1"}
    assert bytes(tensors[EMBEDDING]["data"]) == record.tensors[EMBEDDING].data
    assert tensors[EMBEDDING]["shape"] == [4, 64]


def test_tensor_data_is_aligned():
    value = make_record().serialize()
    assert (8 + int.from_bytes(value[:8], "little")) % 64 == 0


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"other": TensorView("F32", (4, 1), memoryview(bytes(16)))},
        {EMBEDDING: TensorView("I64", (4, 1), memoryview(bytes(32)))},
        {EMBEDDING: TensorView("F32", (3, 1), memoryview(bytes(12)))},
        {EMBEDDING: TensorView("F32", (4,), memoryview(bytes(16)))},
        {EMBEDDING: TensorView("F32", (4, 2), memoryview(bytes(16)))},
        {EMBEDDING: TensorView("F32", (4, 0), memoryview(b""))},
        dict.fromkeys((EMBEDDING, *map(str, range(16))), TensorView("F32", (4, 1), memoryview(bytes(16)))),
    ],
    ids=["none", "no embedding", "dtype", "rows", "rank", "bytes", "no columns", "too many"],
)
def test_contradicting_fields_are_refused(tensors):
    with pytest.raises(RecordError):
        dataclasses.replace(make_record(tokens=4), tensors=tensors).serialize()
