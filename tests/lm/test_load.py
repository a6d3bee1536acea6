"""More clients than places, over real gRPC: all are answered once, and who hangs up makes room within a step."""

from __future__ import annotations

import asyncio
import threading

import pytest
from prometheus_client import REGISTRY

from lookonce.models.qwen2_vl.text import Qwen2VLAdapter
from tests.images import photograph
from tests.lm.split import answer, asking, running, user
from tests.lm.test_service import idle, store_images

CAT = photograph("chelsea", (90, 60))


class Stepwise(Qwen2VLAdapter):
    """A model that waits for permission before every forward."""

    permits = threading.Semaphore(100)  # of the engine's own check at start
    forwards = 0

    def forward(self, *args):
        Stepwise.forwards += 1
        assert Stepwise.permits.acquire(timeout=60)
        return super().forward(*args)


async def until(true):
    for _ in range(6000):
        if true():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never came about")


def cancelled():
    return REGISTRY.get_sample_value("lookonce_lm_requests_total", {"method": "Generate", "outcome": "cancelled"}) or 0


async def test_a_dropped_stream_is_in_no_later_step(checkpoint_path, tmp_path, monkeypatch):
    monkeypatch.setattr("lookonce.models.qwen2_vl.text.Qwen2VLAdapter", Stepwise)
    before = cancelled()
    async with running(checkpoint_path, tmp_path) as client:
        Stepwise.forwards, Stepwise.permits = 0, threading.Semaphore(0)
        stream = client.generate(asking(user("Go on"), max_tokens=500, ignore_eos=True), timeout=60)
        Stepwise.permits.release(3)
        seen = 0
        while seen < 3:  # tokens that are there at the same time come together
            seen += len((await anext(stream)).delta.token_ids)
        await until(lambda: Stepwise.forwards == 4)  # the engine is in the middle of the fourth
        await stream.aclose()
        await until(lambda: cancelled() == before + 1)
        Stepwise.permits.release()
        assert await idle(client) <= 4
        assert Stepwise.forwards == 4
        Stepwise.permits.release(100)
        assert len((await answer(client, asking(user("And now?"), max_tokens=5, ignore_eos=True))).ids) == 5


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.slow)])
async def test_many_requests_on_16_places(checkpoint_path, unsplit, tower, tmp_path, count):
    """Each has its own question and gets that one's answer, whole and once; every tenth client hangs up early."""
    turns = [("user", [CAT, "What is this?"])]
    (message,) = await store_images(f"file://{tmp_path}/store", tower, turns)
    image = message.parts[0]

    def question(i):
        wanted = asking(user(f"Question {i % 20}?"), max_tokens=2 + i % 5, ignore_eos=True)
        if i % 2:
            wanted.messages[0].parts.insert(0, image)
        wanted.client = f"client-{i % 7}"
        return wanted

    async with running(
        checkpoint_path, tmp_path, store=f"file://{tmp_path}/store", max_running=16, max_waiting=count
    ) as client:

        async def one(i):
            if i % 10 == 9:
                stream = client.generate(question(i), timeout=300)
                await anext(stream)
                await stream.aclose()
                return None
            reply = await answer(client, question(i), timeout=300)
            assert reply.finish is not None
            return reply.ids

        replies = await asyncio.gather(*(one(i) for i in range(count)))
        generated = await idle(client)
    whole = {i: ids for i, ids in enumerate(replies) if ids is not None}
    assert all(len(ids) == 2 + i % 5 for i, ids in whole.items())
    dropped = count - len(whole)
    spent = generated - sum(map(len, whole.values()))
    assert dropped <= spent <= 6 * dropped
    for i in range(0, count, count // 10 + 1):
        if i not in whole:
            continue
        parts = [CAT, f"Question {i % 20}?"] if i % 2 else [f"Question {i % 20}?"]
        expected = unsplit.answer_ids([("user", parts)], 2 + i % 5)
        assert whole[i][: len(expected)] == expected
