"""The tower runs once: over restarts, over routes, over replicas, over a shared or an embedded store."""

from __future__ import annotations

import asyncio

import httpx2
import pytest

from tests.images import odd_files, photograph, save
from tests.system.cluster import System, data_url, image_part, text_part


def ten_questions(system, image, start):
    """Five by /questions, five by chat completions; the receipts."""
    asked = system.ask(image, [f"Question {n}?" for n in range(start, start + 5)], max_tokens=4)
    receipts = [answer["receipt"] for answer in asked]
    for n in range(start + 5, start + 10):
        content = [image_part(f"lookonce:{image}"), text_part(f"Question {n}?")]
        receipts.append(system.chat([{"role": "user", "content": content}], max_tokens=4)["receipt"])
    return receipts


def test_an_image_first_seen_in_a_chat_is_encoded_once_for_all(single):
    before = single.encodes()
    data = save(photograph("coffee", (120, 90)), "PNG")
    url = data_url(data)
    first = single.chat([{"role": "user", "content": [image_part(url), text_part("One?")]}], max_tokens=2)
    again = single.chat([{"role": "user", "content": [image_part(url), text_part("Two?")]}], max_tokens=2)
    assert [first["receipt"]["embedding"], again["receipt"]["embedding"]] == ["miss", "hit"]
    assert single.upload(data)["cached"] is True
    assert single.encodes() == before + 1


def test_thirty_questions_over_two_restarts_encode_once(single):
    start = single.encodes()
    image = single.upload(save(photograph("coffee", (300, 200)), "JPEG"))["id"]
    receipts = ten_questions(single, image, 0)
    single.languages[0].restart()
    receipts += ten_questions(single, image, 10)
    before = single.encodes() - start
    single.visions[0].restart()
    receipts += ten_questions(single, image, 20)
    assert before + single.encodes() == 1
    assert {receipt["embedding"] for receipt in receipts} == {"hit"}
    single.wait_whole()


def test_a_hundred_first_requests_over_two_gateways_and_two_encoders_encode_once(double):
    async def burst(data):
        urls = [gateway.url for gateway in double.gateways]
        async with httpx2.AsyncClient(timeout=120, limits=httpx2.Limits(max_connections=100)) as client:
            posts = [
                client.post(f"{urls[n % 2]}/v1/images", files={"file": ("a.png", data, "image/png")})
                for n in range(100)
            ]
            return await asyncio.gather(*posts)

    before = double.encodes()
    replies = asyncio.run(burst(save(photograph("astronaut", (333, 222)), "PNG")))
    assert {reply.status_code for reply in replies} <= {200, 201}, [r.text for r in replies if r.is_error][:1]
    assert len({reply.json()["id"] for reply in replies}) == 1
    assert double.encodes() == before + 1


@pytest.mark.slow  # test_wrong_values and gateway/test_retries hold the same way back, faster
def test_an_evicted_embedding_is_made_again_in_silence(model, tmp_path):
    store = f"file://{tmp_path}/store"
    with System(model, tmp_path, store=store, vision_args=("--store-bytes", "30KiB", "--l1-bytes", "1024")) as system:
        files = list(odd_files().values())[:6]
        images = [system.upload(data)["id"] for data in files]
        first = [system.ask(image, ["What is it?"], max_tokens=6)[0]["text"] for image in images]
        system.languages[0].restart()
        again = [system.ask(image, ["What is it?"], max_tokens=6)[0] for image in images]
        assert [answer["text"] for answer in again] == first
        assert system.encodes() > len(files)  # some were evicted, or this test would prove nothing
