"""`--engine vllm` behind the gateway, over a real vision service and Valkey: `make test-vllm`."""

from __future__ import annotations

import asyncio
import json
import math
import random
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image
from safetensors import safe_open

from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.identity import EmbeddingReference
from lookonce.core.record import EMBEDDING, TensorView, parse_record
from lookonce.core.rpc.client import LanguageClient
from lookonce.core.sample_images import bundled_samples
from lookonce.models.checkpoint import Half, open_checkpoint
from tests.lm.split import answer, asking, user
from tests.processes import ServiceProcess
from tests.system.cluster import System, encoded
from tests.unsplit import Unsplit
from tests.valkey import ValkeyServer
from tests.vllm.stock import PYTHON, ROOT

pytestmark = pytest.mark.vllm
MODEL = ROOT / "lookonce/data/shapes"
VLLM = ("--engine", "vllm", "--kv-bytes", "128MiB", "--prefix-bytes", "128MiB", "--context-length", "2048")


@pytest.fixture(scope="module")
def valkey() -> Iterator[ValkeyServer]:
    with ValkeyServer() as server:
        yield server


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("split") / "halves"
    command = [sys.executable, "-m", "lookonce", "split", str(MODEL), str(out)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    return out


@pytest.fixture(scope="module")
def system(valkey: ValkeyServer, halves: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A vision service of this environment, a language service of vLLM's over the language half."""
    store, folder = valkey.url, tmp_path_factory.mktemp("system")
    language = {"language_args": VLLM, "language_python": str(PYTHON), "language_model": halves / "language"}
    with System(MODEL, folder, store=store, **language) as running:
        yield running


@pytest.fixture(scope="module")
def packed(system: System) -> Iterator[System]:
    """The same with our own engine."""
    with System(MODEL, Path(system.visions[0].log_path).parent, store=system.store) as running:
        yield running


@pytest.fixture(scope="module")
def unsplit() -> Unsplit:
    return Unsplit(MODEL)


def drawn(seed: int) -> bytes:
    """An image that nobody has seen."""
    pixels = np.random.default_rng(seed).integers(0, 255, (84, 84, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels))


def on_client(service: ServiceProcess, call: Callable[[LanguageClient], Awaitable[Any]]) -> Any:
    async def called() -> Any:
        client = LanguageClient(service.address)
        try:
            return await call(client)
        finally:
            await client.close()

    return asyncio.run(called())


def describe(service: ServiceProcess) -> Any:
    return on_client(service, lambda client: client.describe(timeout=60))


def eventually(true: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)


def receipt(answer: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = answer["receipt"]
    return found


def test_greedy_answers_are_transformers_in_any_order_and_nothing_is_encoded_twice(
    system: System, unsplit: Unsplit
) -> None:
    before, wanted = system.encodes(), []
    for sample in bundled_samples():
        image = system.upload(sample.path.read_bytes())["id"]
        picture = Image.open(sample.path).convert("RGB")
        wanted += [(image, text, unsplit.answer([("user", [picture, text])], 16)) for text, _ in sample.questions[:3]]
    random.Random(5).shuffle(wanted)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda one: system.ask(one[0], [one[1]], max_tokens=16)[0], wanted))
    for said, (_, text, expected) in zip(answers, wanted, strict=True):
        assert said["text"] == expected, text
    assert system.encodes() - before == len(bundled_samples())


def test_two_images_in_one_request(system: System, unsplit: Unsplit) -> None:
    paths = [sample.path for sample in bundled_samples()[:2]]
    parts = [{"type": "image_url", "image_url": f"lookonce:{system.upload(path.read_bytes())['id']}"} for path in paths]
    text = "How many shapes are there?"
    answer = system.chat([{"role": "user", "content": [*parts, {"type": "text", "text": text}]}], max_tokens=16)
    pictures = [Image.open(path).convert("RGB") for path in paths]
    assert answer["choices"][0]["message"]["content"] == unsplit.answer([("user", [*pictures, text])], 16)


def test_scores_are_the_packed_engines(system: System, packed: System) -> None:
    questions = [
        {"text": "What colour is it?", "choices": ["red", "green", "blue", "reddish brown"]},
        {"text": "Is there a circle?", "choices": ["yes", "no"]},
    ]
    for sample in bundled_samples()[:3]:
        data = sample.path.read_bytes()
        found, expected = (one.ask(one.upload(data)["id"], questions) for one in (system, packed))
        for mine, theirs in zip(found, expected, strict=True):
            assert mine["logprobs"] == pytest.approx(theirs["logprobs"], abs=1e-4)


def test_usage_and_receipt_of_a_warm_question(system: System, packed: System) -> None:
    """The same product: the same usage, and a receipt that says what was reused, in whole blocks."""
    data = drawn(11)
    cold = system.ask(system.upload(data)["id"], ["What is this?"], max_tokens=4)[0]
    image = system.upload(data)["id"]
    before = system.encodes()
    warm = system.ask(image, ["How many are there?"], max_tokens=4)[0]
    theirs = packed.ask(packed.upload(data)["id"], ["How many are there?"], max_tokens=4)[0]
    assert system.encodes() == before
    assert receipt(cold)["prefix"] == "miss" and receipt(warm)["prefix"] == "hit"
    assert receipt(warm)["embedding"] == "hit"
    assert receipt(warm)["cached_tokens"] % 32 == 0 and receipt(warm)["cached_tokens"] > 0
    assert warm["text"] == theirs["text"]
    assert {k: v for k, v in warm["usage"].items() if "details" not in k} == {
        k: v for k, v in theirs["usage"].items() if "details" not in k
    }
    assert set(receipt(warm)) == set(receipt(theirs))


def test_the_language_half_alone_is_served(halves: Path, system: System) -> None:
    """No vision weight is on its disk; that none is in its processes is held at every start (engine/vllm/checks.py)."""
    half = open_checkpoint(str(halves / "language"), needs=Half.LANGUAGE)
    files = list((halves / "language").glob("*.safetensors"))
    assert files and not [name for file in files for name in safe_open(file, "np").keys() if "visual" in name]  # noqa: SIM118
    sizes = (math.prod(entry.shape) for entry in half.half_entries(Half.LANGUAGE).values())
    assert describe(system.languages[0]).model.weight_bytes == sum(sizes) * 4


def test_what_is_wrong_ends_its_own_request_only(system: System, valkey: ValkeyServer) -> None:
    """Beside each of them a right one is answered as ever."""
    good = system.upload(drawn(1))["id"]
    ask = {"text": "What is this?", "choices": ["red", "blue", "green"]}
    expected = system.ask(good, [ask])[0]["logprobs"]
    store = valkey.client()
    faults = {"nan": 2, "narrow": 3, "short": 4, "damaged": 5, "foreign": 6, "grid": 7}
    for kind, seed in faults.items():
        names = set(store.scan_iter("lookonce:embeddings:*", count=1000))
        image = system.upload(drawn(seed))["id"]
        eventually(lambda names=names: set(store.scan_iter("lookonce:embeddings:*", count=1000)) - names)
        (name,) = set(store.scan_iter("lookonce:embeddings:*", count=1000)) - names
        value = store.get(name)
        record = parse_record(value, bytes.fromhex(name.decode().rpartition(":")[2]))
        tokens, width = record.tensors[EMBEDDING].shape
        rows = np.ones((tokens, width), "<f4")
        if kind == "nan":
            rows[1, 1] = np.nan
        if kind == "narrow":
            rows = rows[:, : width // 2]
        if kind == "short":
            rows = rows[: tokens - 1]
        view = TensorView("F32", rows.shape, memoryview(np.ascontiguousarray(rows)).cast("B"))
        if kind == "damaged":
            store.set(name, value[:-9] + b"\0" * 9)
        elif kind == "foreign":
            store.set(name, store.get(next(iter(names))))
        else:
            t, h, w = record.grid_thw
            grid = (t, 2 * h, w) if kind == "grid" else record.grid_thw
            changed = replace(record, tensors={EMBEDDING: view}, tokens=rows.shape[0], grid_thw=grid)
            store.set(name, changed.serialize())
        with ThreadPoolExecutor(2) as pool:
            beside = pool.submit(system.ask, good, [ask])
            answer = pool.submit(system.ask, image, ["What is this?"], max_tokens=4).result()[0]
        assert "text" in answer, (kind, answer)  # made again by the vision service, which still has it
        assert beside.result()[0]["logprobs"] == pytest.approx(expected, abs=1e-5), kind


def test_an_erased_image_is_answered_by_nobody(system: System) -> None:
    data = drawn(21)
    image = system.upload(data)["id"]
    assert system.ask(image, ["What is this?"], max_tokens=4)[0]["text"] is not None
    assert system.http.delete(f"/v1/images/{image}").json()["complete"] is True
    reply = system.http.post(f"/v1/images/{image}/questions", json={"questions": ["What is this?"]})
    assert reply.status_code == 404
    before = system.encodes()
    again = system.ask(system.upload(data)["id"], ["What is this?"], max_tokens=4)[0]
    assert system.encodes() == before + 1
    assert receipt(again)["prefix"] == "miss", "KV of the erased image was found"


def test_a_reference_to_nothing_is_told_so(system: System, valkey: ValkeyServer) -> None:
    """Past the gateway: an embedding that was erased, and a key that was never one's."""
    store = valkey.client()
    names = set(store.scan_iter("lookonce:embeddings:*", count=1000))
    image = system.upload(drawn(22))["id"]
    eventually(lambda: set(store.scan_iter("lookonce:embeddings:*", count=1000)) - names)
    (name,) = set(store.scan_iter("lookonce:embeddings:*", count=1000)) - names
    key = bytes.fromhex(name.decode().rpartition(":")[2])
    record = parse_record(store.get(name), key)
    fields = (record.image_digest, record.grid_thw, record.tokens, record.width, record.height)
    known, unknown = (EmbeddingReference(one, record.fingerprint, *fields) for one in (key, bytes(32)))

    def asked(reference: EmbeddingReference) -> Any:
        request = asking(user(reference, "What is this?"), max_tokens=4)
        return on_client(system.languages[0], lambda client: answer(client, request))

    assert asked(known)
    assert system.http.delete(f"/v1/images/{image}").json()["complete"] is True
    for reference in (known, unknown):
        with pytest.raises(LookonceError) as caught:
            asked(reference)
        assert caught.value.kind is ErrorKind.EMBEDDING_MISSING


def test_erasure_while_others_are_answered(system: System) -> None:
    """They are computed again from their beginning when nobody pauses, and say the same."""
    image, other = system.upload(drawn(31))["id"], system.upload(drawn(32))["id"]
    expected = system.ask(other, ["Tell me a long story."], max_tokens=900, ignore_eos=True)[0]["text"]
    with ThreadPoolExecutor(2) as pool:
        stories = [
            pool.submit(system.ask, other, ["Tell me a long story."], max_tokens=900, ignore_eos=True) for _ in range(2)
        ]
        time.sleep(0.5)
        assert system.http.delete(f"/v1/images/{image}").status_code == 200
        assert [story.result()[0]["text"] for story in stories] == [expected] * 2


def test_cancel_and_deadline_leave_nothing_unfinished(system: System) -> None:
    image = system.upload(drawn(41))["id"]
    content = [{"type": "image_url", "image_url": f"lookonce:{image}"}, {"type": "text", "text": "Go on."}]
    body = {"model": system.model, "messages": [{"role": "user", "content": content}], "max_tokens": 1500}
    with system.http.stream("POST", "/v1/chat/completions", json={**body, "stream": True, "ignore_eos": True}) as reply:
        assert next(reply.iter_lines()).startswith("data:")
    eventually(lambda: describe(system.languages[0]).running == 0, 20)
    request = asking(user("Go on."), max_tokens=1500, ignore_eos=True)
    request.timeout = 0.3
    with pytest.raises(LookonceError) as caught:
        on_client(system.languages[0], lambda client: answer(client, request))
    assert caught.value.kind is ErrorKind.DEADLINE_EXCEEDED
    eventually(lambda: describe(system.languages[0]).running == 0, 20)


def test_many_questions_at_once(system: System, packed: System) -> None:
    data = drawn(51)
    questions = [f"Question number {number}: what is there?" for number in range(32)]
    found = system.ask(system.upload(data)["id"], questions, max_tokens=6)
    expected = packed.ask(packed.upload(data)["id"], questions, max_tokens=6)
    assert [one["text"] for one in found] == [one["text"] for one in expected]


def test_answers_of_a_given_form(system: System, packed: System) -> None:
    """The same forms, held by both engines; the same answers where the model decides among what a form lets it say."""
    shape = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green", "blue"]}, "count": {"enum": [1, 2, 3]}},
    }
    questions = [
        {"text": "What is there?", "schema": {**shape, "required": ["colour", "count"]}},
        {"text": "What is there?", "regex": "(red|green|blue) (star|cross|circle)"},
        {
            "text": "What is there?",
            "schema": {"type": "array", "items": {"type": "boolean"}, "minItems": 3, "maxItems": 3},
        },
        {"text": "What is there?", "schema": {"type": "object", "properties": {"a": {"not": {}}}}},
        "What is there?",
    ]
    options = {"max_tokens": 60, "guided_choice": ["nothing at all", "a star"]}
    data = bundled_samples()[0].path.read_bytes()
    found = system.ask(system.upload(data)["id"], questions, **options)
    expected = packed.ask(packed.upload(data)["id"], questions, **options)
    assert json.loads(found[0]["text"]).keys() == {"colour", "count"} and len(json.loads(found[2]["text"])) == 3
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.get("text") == theirs.get("text") and mine.get("error") == theirs.get("error")
        assert mine.get("finish_reason") == theirs.get("finish_reason")
    assert "not" in found[3]["error"]["message"]


def test_redis_down_in_the_middle(system: System, valkey: ValkeyServer) -> None:
    data = drawn(61)
    image = system.upload(data)["id"]
    valkey.stop()
    try:
        answer = system.ask(image, ["What is this?"], max_tokens=4)[0]
    finally:
        valkey.resume()
    assert answer["text"] is not None


def engine_core(service: ServiceProcess) -> psutil.Process:
    children = psutil.Process(service.pid).children(recursive=True)
    return next(child for child in children if "EngineCore" in "".join(child.cmdline()) + child.name())


def test_a_killed_engine_core_ends_the_process_and_no_answer_is_wrong(system: System) -> None:
    """Under load: whoever is answered is answered rightly; the service ends, and serves again once it is started."""
    service = system.languages[0]
    image = system.upload(bundled_samples()[0].path.read_bytes())["id"]
    text = bundled_samples()[0].questions[0][0]
    expected = system.ask(image, [text], max_tokens=16)[0]["text"]
    wrong: list[str] = []
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            reply = system.http.post(
                f"/v1/images/{image}/questions", json={"questions": [text], "max_tokens": 16}, timeout=30
            )
            said = reply.json()["answers"][0] if reply.status_code == 200 else {}
            if said.get("text") not in (expected, None):
                wrong.append(json.dumps(said))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    pids = [child.pid for child in psutil.Process(service.pid).children(recursive=True)]
    engine_core(service).kill()
    assert service.wait_exit(60) == 1
    eventually(lambda: not any(psutil.pid_exists(pid) for pid in pids), 30)
    began = time.monotonic()
    service.restart()
    system.wait_whole()
    print(f"back in {time.monotonic() - began:.1f} s")
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert system.ask(image, [text], max_tokens=16)[0]["text"] == expected


def test_a_killed_service_leaves_nothing_behind(system: System) -> None:
    """SIGKILL, as for want of memory: vLLM's processes end, too; what it left in memory goes with its next start."""
    service = system.languages[0]
    pids = [child.pid for child in psutil.Process(service.pid).children(recursive=True)]
    assert len(pids) >= 2
    service.kill()
    eventually(lambda: not any(psutil.pid_exists(pid) for pid in pids), 30)
    service.restart()
    assert len(list(Path("/dev/shm").glob("lookonce-lm-*"))) == 1
    system.wait_whole()


def test_it_ends_whole(system: System) -> None:
    """SIGTERM: exit status 0, no process and no file in memory is left."""
    service = system.languages[0]
    pids = [child.pid for child in psutil.Process(service.pid).children(recursive=True)]
    assert service.terminate(60) == 0
    eventually(lambda: not any(psutil.pid_exists(pid) for pid in pids), 30)
    assert not list(Path("/dev/shm").glob("lookonce-lm-*"))
    service.restart()
