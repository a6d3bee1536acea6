"""Images resized as a request asks: by `mm_processor_kwargs`, a part's own fields, those of images and questions."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from gateway.images.image_records import MAX_REFERENCES, ImageRecord, ImageRecords, resize_key
from gateway.images.image_store import StoreWithSpare
from gateway.images.pixel_bounds import AS_SERVED, PixelBounds
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.identity import EmbeddingReference
from lookonce.core.stores.memory import MemoryStore
from protos.lookonce.v1 import vision_pb2
from tests.gateway.conftest import Services

ImageFile = Callable[..., bytes]
CHAT = "/v1/chat/completions"
TOKEN = 28 * 28  # pixels


def chat(url: str, part: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    shown = {"type": "image_url", "image_url": {"url": url}, **(part or {})}
    return {
        "messages": [{"role": "user", "content": [shown, {"type": "text", "text": "?"}]}],
        "max_tokens": 2,
        **fields,
    }


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def kwargs(**bounds: Any) -> dict[str, Any]:
    return {"mm_processor_kwargs": bounds}


def tokens(answer: dict[str, Any]) -> int:
    return int(answer["usage"]["prompt_tokens_details"]["image_tokens"])


def test_each_pair_of_bounds_is_encoded_once_whatever_names_it(
    http: httpx2.Client, services: Services, image_file: ImageFile
) -> None:
    data, before = image_file(280, 280), services.encodes()
    small = {"min_pixels": 20 * TOKEN, "max_pixels": 40 * TOKEN}
    large = {"min_pixels": 200 * TOKEN}
    sizes = []
    for number, bounds in enumerate((small, large), start=1):
        whole = http.post(CHAT, json=chat(data_url(data), **kwargs(**bounds))).json()
        assert whole["receipt"]["embedding"] == "miss" and services.encodes() == before + number
        size = tokens(whole)
        assert bounds["min_pixels"] <= size * TOKEN <= bounds.get("max_pixels", 240 * TOKEN)
        sizes.append(size)
        uploaded = http.post("/v1/images", json={"data": base64.b64encode(data).decode(), **bounds}).json()
        form = {name: str(pixels) for name, pixels in bounds.items()}
        formed = http.post("/v1/images", files={"file": data}, data=form).json()
        assert (uploaded["tokens"], uploaded["cached"], formed["tokens"], formed["cached"]) == (size, True) * 2
        kept = f"/v1/images/{uploaded['id']}/questions"
        asked = [{"text": "?", "max_tokens": 2}, {"text": "?", "choices": ["a", "b"]}]
        answer, scored = http.post(kept, json={"questions": asked, **bounds}).json()["answers"]
        assert answer["text"] == whole["choices"][0]["message"]["content"]
        assert tokens(answer) == tokens(scored) == size and answer["receipt"]["embedding"] == "hit"
        by_kwargs = http.post(kept, json={"questions": ["?"], "max_tokens": 2, **kwargs(**bounds)}).json()["answers"][0]
        by_part = http.post(CHAT, json=chat(f"lookonce:{uploaded['id']}", part=bounds)).json()
        assert tokens(by_kwargs) == tokens(by_part) == size
        assert by_part["choices"] == whole["choices"]
    assert sizes[0] < 100 < sizes[1] and services.encodes() == before + 2
    assert tokens(http.post(CHAT, json=chat(data_url(data))).json()) == 100
    erased = http.delete(f"/v1/images/{uploaded['id']}").json()
    assert erased["complete"] and services.encodes() == before + 3
    for number, bounds in enumerate((small, large), start=4):  # nothing is left of either
        assert http.post(CHAT, json=chat(data_url(data), **kwargs(**bounds))).json()["receipt"]["embedding"] == "miss"
        assert services.encodes() == before + number


def test_bounds_combine_the_larger_min_the_smaller_max(http: httpx2.Client, image_file: ImageFile) -> None:
    url = data_url(image_file(840, 560))

    def size(part: dict[str, Any] | None = None, detail: str | None = None, **bounds: int) -> int:
        body = chat(url, part=part, **kwargs(**bounds))
        body["messages"][0]["content"][0]["image_url"]["detail"] = detail
        return tokens(http.post(CHAT, json=body).json())

    assert size() == 600 and size(detail="low") <= 256
    assert size(detail="low", max_pixels=300 * TOKEN) == size(detail="low")
    assert size(detail="low", max_pixels=50 * TOKEN) == size(max_pixels=50 * TOKEN) <= 50
    assert size({"max_pixels": 50 * TOKEN}, max_pixels=80 * TOKEN) == size(max_pixels=50 * TOKEN)
    assert size({"max_pixels": 80 * TOKEN}, max_pixels=50 * TOKEN) == size(max_pixels=50 * TOKEN)
    assert size({"min_pixels": 700 * TOKEN}, min_pixels=650 * TOKEN) == size(min_pixels=700 * TOKEN) >= 700


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"min_pixels": 0}, "min_pixels"),
    ({"max_pixels": -1}, "max_pixels"),
    ({"max_pixels": "50000"}, "max_pixels"),
    ({"min_pixels": True}, "min_pixels"),
    ({"max_pixels": 50000.0}, "max_pixels"),
    ({"max_pixels": 1 << 40}, "max_pixels"),
    ({"min_pixels": 60000, "max_pixels": 50000}, "min_pixels"),
    ({"max_pixels": 783}, "max_pixels"),
    ({"max_pixels": 100_000_000}, "max_pixels"),
    ({"min_pixels": 100_000_000}, "min_pixels"),
]


@pytest.mark.parametrize(("bounds", "name"), [*WRONG, ({"longest_edge": 9}, "longest_edge")])
def test_what_is_out_of_range_is_refused_by_field(
    http: httpx2.Client, services: Services, image_file: ImageFile, bounds: dict[str, Any], name: str
) -> None:
    data = image_file()
    kept, before = http.post("/v1/images", files={"file": data}).json()["id"], services.encodes()
    inline, questions = data_url(data), f"/v1/images/{kept}/questions"
    # the prefixes of fields, and the requests that hold them
    requests = [
        ("mm_processor_kwargs.", CHAT, chat(inline, **kwargs(**bounds))),
        ("mm_processor_kwargs.", CHAT, chat(f"lookonce:{kept}", stream=True, **kwargs(**bounds))),
        ("messages.0.content.0.", CHAT, chat(inline, part=bounds)),
        ("mm_processor_kwargs.", questions, {"questions": ["?"], **kwargs(**bounds)}),
        ("", questions, {"questions": ["?"], **bounds}),
        ("", questions, {"questions": ["?"], "stream": True, **bounds}),
        ("", "/v1/images", {"data": inline, **bounds}),
    ]
    for prefix, path, body in requests:
        reply = http.post(path, json=body)
        assert reply.status_code == 400, reply.text
        error = reply.json()["error"]
        assert error["param"] == prefix + name and f"'{prefix}{name}'" in error["message"], (path, error)
    assert services.encodes() == before


def test_a_form_holds_whole_numbers(http: httpx2.Client, image_file: ImageFile) -> None:
    for form, name in (({"max_pixels": "1e5"}, "max_pixels"), ({"min_pixels": "0"}, "min_pixels")):
        reply = http.post("/v1/images", files={"file": image_file()}, data=form)
        assert reply.status_code == 400 and reply.json()["error"]["param"] == name, reply.text


def test_other_keys_and_other_forms_are_refused_by_name(http: httpx2.Client) -> None:
    for value, name in (({"fps": 2}, "mm_processor_kwargs.fps"), ([], "mm_processor_kwargs")):
        reply = http.post(CHAT, json={"messages": [{"role": "user", "content": "?"}], "mm_processor_kwargs": value})
        assert reply.status_code == 400 and reply.json()["error"]["param"] == name, reply.text
    for value in ({}, None):
        body = {"messages": [{"role": "user", "content": "?"}], "max_tokens": 1, "mm_processor_kwargs": value}
        assert http.post(CHAT, json=body).status_code == 200


def test_a_record_names_its_references_as_before_and_not_without_end() -> None:
    def reference(name: str) -> EmbeddingReference:
        return EmbeddingReference(name.encode().ljust(32), "f" * 64, bytes(32), (1, 2, 2), 1, 28, 28)

    assert resize_key(AS_SERVED) == "full" and resize_key(PixelBounds(max=50000)) == "50000"
    assert resize_key(PixelBounds(max=50000), "new") == "new/50000"
    assert resize_key(PixelBounds(100)) == "100-full" and resize_key(PixelBounds(100, 200), "new") == "new/100-200"
    record = ImageRecord(bytes(32), "red", 1, 0.0, 1e12)
    for number in range(2 * MAX_REFERENCES):
        name = resize_key(PixelBounds(max=1000 + number))
        record = record.with_reference("full", reference("full")).with_reference(name, reference(name))
    assert len(record.references) == MAX_REFERENCES and record.reference == reference("full")


def test_bounds_that_a_policy_sets_bend_and_asked_ones_do_not() -> None:
    service = vision_pb2.VisionDescription(min_pixels=3136, max_pixels=100_000, least_pixels=784)
    assert PixelBounds(max=200_000).within(service) == AS_SERVED
    assert PixelBounds(max=100).within(service) == PixelBounds(max=784)
    with pytest.raises(LookonceError, match=r"'a\.max_pixels' must be from 784 to 100000, got 200000: --max-pixels"):
        PixelBounds(None, 200_000, "a.min_pixels", "a.max_pixels").within(service)
    asked = PixelBounds(50_000, None, "min_pixels", "max_pixels")
    assert asked.within(service) == asked
    with pytest.raises(LookonceError, match="'min_pixels' is 50000, above the bound of detail 'low'") as caught:
        PixelBounds(max=40_000).joined(asked)
    assert (caught.value.kind, caught.value.param) == (ErrorKind.INVALID_ARGUMENT, "min_pixels")


async def test_a_record_that_was_written_before_there_was_a_min_is_read() -> None:
    made = {"fingerprint": "ab" * 32, "image_digest": "07" * 32, "grid_thw": [1, 4, 4], "tokens": 4}
    made |= {"width": 56, "height": 56, "record_bytes": 100}
    references = {name: {"key": f"{number:02}" * 32, **made} for number, name in enumerate(("full", "200704", "b/9"))}
    fields = {"version": 1, "digest": "07" * 32, "tenant": "red", "size": 10, "created": 1.0, "expires": 4e9}
    fields |= {"references": references, "deleted": False, "erased": False, "ttl": None, "pinned": False}
    fields |= {"aliases": [], "upload": "00" * 8, "changed": 0.0}
    kept = StoreWithSpare(MemoryStore(1 << 20), MemoryStore(1 << 20))
    await kept.store.put(b"record:" + bytes([7] * 32), json.dumps(fields).encode(), ttl=100)
    record = await ImageRecords(kept).load(bytes([7] * 32))
    assert record is not None and record.reference == record.references[resize_key(AS_SERVED)]
    low = record.references[resize_key(PixelBounds(max=200704))]
    assert (low.key, low.tokens) == (bytes([1] * 32), 4)
    assert record.references[resize_key(PixelBounds(max=9), "b")].key == bytes([2] * 32)
