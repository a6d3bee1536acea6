"""Real processes: both services, killed, restarted, drained; and starts that fail."""

from __future__ import annotations

import asyncio
import signal
import socket

import pytest

from lm_service.app import load, serve
from lm_service.settings import LanguageSettings
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.identity import EmbeddingReference
from lookonce.core.process import PERMANENT_EXIT
from lookonce.core.rpc.client import LanguageClient, VisionClient
from lookonce.core.stores import open_store
from protos.lookonce.v1 import language_pb2, vision_pb2
from tests.images import photograph
from tests.lm.split import answer, asking, encoded, running, user
from tests.lm.test_embeddings import THEIRS, Peer, serving
from tests.processes import ServiceProcess

CAT, CUP = photograph("chelsea", (225, 150)), photograph("coffee", (90, 140))


async def test_a_pair_of_processes_through_thick_and_thin(checkpoint_path, unsplit, tmp_path):
    common = ["--model", str(checkpoint_path), "--device", "cpu", "--dtype", "float32"]
    # The stores are apart on purpose: what the language service's lacks is fetched.
    vision = ServiceProcess("vision_service", *common, "--store", f"file://{tmp_path}/vision")
    language = ServiceProcess("lm_service", *common, "--store", f"file://{tmp_path}/lm", "--vision", vision.address)
    with vision, language:
        eyes, words = VisionClient(vision.address), LanguageClient(language.address)
        cat = (await eyes.encode(vision_pb2.EncodeRequest(image=encoded(CAT)))).reference
        question = asking(user(cat, "What is this?"))
        expected = unsplit.answer_ids([("user", [CAT, "What is this?"])], 8)

        async def ask():
            reply = await answer(words, question)
            assert reply.ids == expected
            return reply.finish.receipt.embedding

        assert await ask() == language_pb2.FETCHED
        assert await ask() == language_pb2.NOT_NEEDED
        assert (await eyes.describe()).encodes == 1

        vision.kill()
        assert (await lost(words)).kind is ErrorKind.EMBEDDING_MISSING
        assert await ask() == language_pb2.NOT_NEEDED, "cached images answer without a vision service"

        language.kill()
        await eyes.close()
        await words.close()
    async with running(checkpoint_path, tmp_path, store=f"file://{tmp_path}/lm", vision=vision.address) as words:
        assert await ask() == language_pb2.STORE, "what was fetched was written back, and outlives a kill"


async def lost(client):
    """The error of asking about an image nobody has."""
    (fingerprint, *_) = (await client.describe()).fingerprints
    unknown = EmbeddingReference(bytes(32), fingerprint, bytes(32), (1, 4, 4), 4, 56, 56)
    with pytest.raises(LookonceError) as caught:
        await answer(client, asking(user(unknown)))
    return caught.value


async def drains(language, client):
    """SIGTERM in the middle of an answer: it is finished, then the process ends with status 0."""
    ids = []
    async for event in client.generate(asking(user("Go on"), max_tokens=200, ignore_eos=True), timeout=60):
        if not ids:
            language.process.send_signal(signal.SIGTERM)
        ids += event.delta.token_ids
    assert len(ids) == 200
    assert await asyncio.to_thread(language.wait_exit) == 0
    with pytest.raises(LookonceError) as caught:
        await client.describe()
    assert caught.value.kind is ErrorKind.UNAVAILABLE


async def test_another_models_vision_service_is_named_and_not_fatal(checkpoint_path, tower, tmp_path, capsys):
    url = f"file://{tmp_path}/store"
    reference, record = tower.record(CUP)
    store = open_store(url)
    await store.put(reference.key, record.serialize())
    await store.close()
    unknown, _ = tower.record(CAT)
    peer = Peer(THEIRS)
    async with serving(peer) as (address,), running(checkpoint_path, tmp_path, store=url, vision=address) as client:
        assert (await answer(client, asking(user(reference, "What?")))).finish.receipt.embedding == language_pb2.STORE
        with pytest.raises(LookonceError) as caught:
            await answer(client, asking(user(unknown)))
        assert caught.value.kind is ErrorKind.EMBEDDING_MISSING
    assert peer.fetches == 0
    said = "".join(capsys.readouterr())  # on stderr where an earlier test has configured logging
    (line,) = [line for line in said.splitlines() if "another model" in line]
    assert THEIRS in line
    assert tower.fingerprint in line


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--model", "/nowhere/at/all"], PERMANENT_EXIT, "no such directory"),
        ([], 2, "LOOKONCE_LM_MODEL"),
        (["--model", "x", "--max-running", "zero"], 2, "max-running"),
    ],
    ids=["no such model", "model missing", "bad value"],
)
def test_a_failed_start_says_why_in_one_line(arguments, status, words):
    process = ServiceProcess("lm_service", *arguments, "--log-format", "json")
    try:
        assert process.wait_exit() == status
        assert words in process.log
        assert "Traceback" not in process.log
    finally:
        process.close()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device": "cuda:9"}, "cuda:9"),
        ({"device": "toaster"}, "toaster"),
        ({"context_length": 999_999}, "32768"),
        ({"store": "ftp://x"}, "scheme"),
        ({"kv_bytes": 900 << 40}, "--kv-bytes less"),
    ],
    ids=["no such GPU", "no such device", "context", "store", "more KV than memory"],
)
async def test_settings_that_cannot_work_end_the_start(checkpoint_path, changes, words):
    settings = LanguageSettings(**{"model": str(checkpoint_path), "device": "cpu", "listen": "127.0.0.1:0"} | changes)
    with pytest.raises(LookonceError, match=words):
        await serve(settings, load(settings))


async def test_an_address_in_use_ends_the_start(checkpoint_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        settings = LanguageSettings(model=str(checkpoint_path), device="cpu", listen=address)
        with pytest.raises(LookonceError, match="cannot listen"):
            await serve(settings, load(settings))


async def test_a_fault_that_leaves_the_engine_unusable_ends_the_process_and_a_new_one_answers_and_drains(
    checkpoint_path, unsplit, tmp_path
):
    switch = tmp_path / "fault"
    with ServiceProcess(
        "tests.lm.faulty_service", "--model", str(checkpoint_path), "--device", "cpu", "--dtype", "float32", str(switch)
    ) as language:
        client = LanguageClient(language.address)
        question = asking(user("What is this?"))
        expected = unsplit.answer_ids([("user", ["What is this?"])], 8)
        assert (await answer(client, question)).ids == expected
        switch.touch()
        kinds = []
        while len(kinds) < 10 and (not kinds or kinds[-1] is ErrorKind.INTERNAL):
            with pytest.raises(LookonceError) as caught:
                await answer(client, question)
            assert "secret" not in caught.value.message
            kinds.append(caught.value.kind)
        assert kinds == [ErrorKind.INTERNAL, ErrorKind.INTERNAL, ErrorKind.UNAVAILABLE]
        assert not await client.healthy()
        assert await asyncio.to_thread(language.wait_exit) == 1
        assert "engine_unusable" in language.log and "unusable; a new process is needed" in language.log
        switch.unlink()
        await asyncio.to_thread(language.restart)
        await client.close()
        client = LanguageClient(language.address)
        assert (await answer(client, question)).ids == expected
        await drains(language, client)
        await client.close()
