"""The tower runs once: over restarts, over routes, over replicas, over a shared or an embedded store."""

from __future__ import annotations

import asyncio

import httpx2
import pytest

from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from tests.images import odd_files, photograph, save
from tests.system.cluster import System, data_url, image_part, text_part
from tests.valkey import PATIENT, ValkeyServer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_random_checkpoint(tmp_path_factory.mktemp("once") / "model", layout="nested", tied=False, shards=2)


def ten_questions(system, image, start):
    """Five by /questions, five by chat completions; the receipts."""
    asked = system.ask(image, [f"Question {n}?" for n in range(start, start + 5)], max_tokens=4)
    receipts = [answer["receipt"] for answer in asked]
    for n in range(start + 5, start + 10):
        content = [image_part(f"lookonce:{image}"), text_part(f"Question {n}?")]
        receipts.append(system.chat([{"role": "user", "content": content}], max_tokens=4)["receipt"])
    return receipts


@pytest.fixture(scope="module")
def system(model, tmp_path_factory):
    """One that tests share: each leaves it whole."""
    with System(model, tmp_path_factory.mktemp("once")) as running:
        yield running


def test_an_image_first_seen_in_a_chat_is_encoded_once_for_all(system):
    before = system.encodes()
    data = save(photograph("coffee", (120, 90)), "PNG")
    url = data_url(data)
    first = system.chat([{"role": "user", "content": [image_part(url), text_part("One?")]}], max_tokens=2)
    again = system.chat([{"role": "user", "content": [image_part(url), text_part("Two?")]}], max_tokens=2)
    assert [first["receipt"]["embedding"], again["receipt"]["embedding"]] == ["miss", "hit"]
    assert system.upload(data)["cached"] is True
    assert system.encodes() == before + 1


def test_thirty_questions_over_two_restarts_encode_once(system):
    start = system.encodes()
    image = system.upload(save(photograph("coffee", (300, 200)), "JPEG"))["id"]
    receipts = ten_questions(system, image, 0)
    system.languages[0].restart()
    receipts += ten_questions(system, image, 10)
    before = system.encodes() - start
    system.visions[0].restart()
    receipts += ten_questions(system, image, 20)
    assert before + system.encodes() == 1
    assert {receipt["embedding"] for receipt in receipts} == {"hit"}
    system.wait_whole()


def test_a_hundred_first_requests_over_two_gateways_and_two_encoders_encode_once(model, tmp_path):
    async def burst(system, data):
        urls = [gateway.url for gateway in system.gateways]
        async with httpx2.AsyncClient(timeout=120, limits=httpx2.Limits(max_connections=100)) as client:
            posts = [
                client.post(f"{urls[n % 2]}/v1/images", files={"file": ("a.png", data, "image/png")})
                for n in range(100)
            ]
            return await asyncio.gather(*posts)

    with (
        ValkeyServer() as valkey,
        System(
            model,
            tmp_path,
            visions=2,
            gateways=2,
            store=f"{valkey.url}?{PATIENT}",
            gateway_args=("--max-concurrency", "200"),
        ) as system,
    ):
        for n, size in enumerate([(333, 222), (57, 1000)]):
            replies = asyncio.run(burst(system, save(photograph("astronaut", size), "PNG")))
            assert {reply.status_code for reply in replies} <= {200, 201}, [r.text for r in replies if r.is_error][:1]
            assert len({reply.json()["id"] for reply in replies}) == 1
            assert system.encodes() == n + 1


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
