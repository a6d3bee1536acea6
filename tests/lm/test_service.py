"""The service behind its socket: the unsplit model's answers, streaming, scores, bounds, deadlines, cancellation."""

from __future__ import annotations

import asyncio
import json
import math
import shutil

import pytest
import torch

from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.stores import open_store
from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from protos.lookonce.v1 import common_pb2, language_pb2
from tests.images import photograph
from tests.lm.split import Tower, answer, answers, asking, running, user
from tests.unsplit import Unsplit

CAT, CUP, MAN = photograph("chelsea", (225, 150)), photograph("coffee", (90, 140)), photograph("astronaut", (29, 31))
CONVERSATIONS = {
    "text only": [("user", ["Who are you?"])],
    "one image": [("user", [CAT, "What is this?"])],
    "image after text": [("user", ["What is this?", CUP])],
    "three images": [("user", ["First", CAT, "second", CUP, "third", MAN, "Which is a cup?"])],
    "multi-turn": [
        ("system", ["Answer in one word."]),
        ("user", [CAT, "What animal?"]),
        ("assistant", ["A cat."]),
        ("user", ["And here?", MAN, "Who?"]),
    ],
}


@pytest.fixture(scope="module", params=["published-tied", "published-untied", "nested-tied", "nested-untied"])
def model(request, tmp_path_factory):
    layout, tied = request.param.split("-")
    path = tmp_path_factory.mktemp("model") / "model"
    make_random_checkpoint(path, layout=layout, tied=tied == "tied", seed=len(request.param))
    return path, Unsplit(path), Tower(path)


async def store_images(url, tower, turns):
    """Put every image's embedding in the store; the conversation as messages that refer to them."""
    store = open_store(url)
    messages = []
    for role, parts in turns:
        made = []
        for part in parts:
            if not isinstance(part, str):
                reference, record = tower.record(part)
                await store.put(reference.key, record.serialize())
                part = reference
            made.append(part)
        messages.append(user(*made, role=role))
    await store.close()
    return messages


async def test_answers_are_the_unsplit_models(model, tmp_path):
    path, unsplit, tower = model
    url = f"file://{tmp_path}/store"
    conversations = {name: await store_images(url, tower, turns) for name, turns in CONVERSATIONS.items()}
    first_words = set()
    async with running(path, tmp_path, store=url) as client:
        for name, turns in CONVERSATIONS.items():
            reply = await answer(client, asking(*conversations[name], max_tokens=10, logprobs=20))
            assert reply.ids == unsplit.answer_ids(turns, 10), name
            expected = unsplit.logits(turns).log_softmax(-1)
            top = reply.logprobs[0].top
            got = torch.tensor([entry.logprob for entry in top])
            torch.testing.assert_close(got, expected[[entry.token_id for entry in top]], atol=1e-4, rtol=0)
            usage = reply.finish.usage
            assert usage.prompt_tokens == unsplit.inputs(turns)["input_ids"].shape[1]
            assert usage.completion_tokens == len(reply.ids)
            first_words.add(tuple(reply.ids))
    assert len(first_words) > 2, "answers depend on what is asked"


@pytest.fixture
async def client(checkpoint_path, tmp_path):
    async with running(
        checkpoint_path, tmp_path, store=f"file://{tmp_path}/store", max_running=2, max_waiting=1
    ) as one:
        yield one


async def with_image(tower, tmp_path, *texts, image=CAT):
    (message,) = await store_images(f"file://{tmp_path}/store", tower, [("user", [image, *texts])])
    return message


async def test_the_image_decides_the_answer(client, tower, tmp_path):
    one = await answer(client, asking(await with_image(tower, tmp_path, "What?", image=CAT)))
    other = await answer(client, asking(await with_image(tower, tmp_path, "What?", image=CAT.rotate(180))))
    assert one.ids != other.ids


async def test_the_receipt_tells_where_the_embedding_came_from(client, tower, tmp_path):
    message = await with_image(tower, tmp_path, "What?")
    first, second = [(await answer(client, asking(message))).finish for _ in range(2)]
    assert first.receipt.embedding == language_pb2.STORE
    assert second.receipt.embedding == language_pb2.NOT_NEEDED
    assert second.receipt.prefix_hit
    assert second.usage.cached_tokens > message.parts[0].image.tokens
    assert first.receipt.fingerprint == tower.fingerprint
    assert first.receipt.model == "model"
    assert 0 < first.receipt.ttft_ms <= first.receipt.total_ms
    assert first.receipt.load_ms > 0
    assert first.usage.image_tokens == message.parts[0].image.tokens
    text = (await answer(client, asking(user("hi")))).finish.receipt
    assert (text.embedding, text.fingerprint) == (language_pb2.EMBEDDING_SOURCE_UNSPECIFIED, "")


async def test_deltas_hold_whole_characters_and_add_up(client, unsplit):
    pieces, ids = [], []
    async for event in client.generate(asking(user("hé 🐈"), max_tokens=60, ignore_eos=True), timeout=60):
        pieces.append(event.delta.text)
        ids += event.delta.token_ids
    assert len(ids) == 60
    assert "".join(pieces) == unsplit.tokenizer.decode(ids, skip_special_tokens=True)


async def test_a_stop_string_is_never_shown(client):
    whole = await answer(client, asking(user("Tell"), max_tokens=40, ignore_eos=True))
    stop = whole.text[6:9]
    cut = await answer(client, asking(user("Tell"), max_tokens=40, ignore_eos=True, stop=[stop]))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert (cut.finish.reason, cut.finish.stop) == (language_pb2.STOP, stop)
    assert cut.ids == whole.ids[: len(cut.ids)]


async def test_seeded_answers_repeat_and_n_differ(client):
    request = asking(user("Tell"), n=2, temperature=1.5, seed=7, max_tokens=12, ignore_eos=True)
    first, second = await answers(client, request), await answers(client, request)
    assert [reply.ids for reply in first] == [reply.ids for reply in second]
    assert len({tuple(reply.ids) for reply in first}) == 2
    alone = await answer(client, asking(user("Tell"), temperature=1.5, seed=7, max_tokens=12, ignore_eos=True))
    assert alone.ids == first[0].ids


async def test_greedy_answers_are_alike_alone_and_at_once(client, tower, tmp_path):
    message = await with_image(tower, tmp_path, "What?")
    requests = [asking(message), asking(user("hi")), asking(user("ho"), max_tokens=5)]
    alone = [(await answer(client, request)).ids for request in requests]
    assert [reply.ids for reply in await asyncio.gather(*(answer(client, request) for request in requests))] == alone


async def test_scores_are_the_unsplit_models(client, tower, unsplit, tmp_path):
    message = await with_image(tower, tmp_path, "Cat?")
    choices = ["yes", "no", "maybe so"]
    item = language_pb2.ScoreItem(id="q1", messages=[message], choices=choices)
    other = language_pb2.ScoreItem(id="q2", messages=[user("Dog?")], choices=["yes", "no"])
    reply = await client.score(language_pb2.ScoreRequest(items=[item, other]), timeout=60)
    assert [result.id for result in reply.results] == ["q1", "q2"]
    scores = reply.results[0].scores.choices
    assert [entry.choice for entry in scores] == choices
    for entry in scores:
        expected = unsplit_logprob(unsplit, [("user", [CAT, "Cat?"])], entry.choice)
        assert entry.logprob == pytest.approx(expected, abs=1e-3)
    total = sum(math.exp(entry.logprob) for entry in scores)
    assert [entry.probability for entry in scores] == pytest.approx([math.exp(e.logprob) / total for e in scores])
    assert scores[2].tokens == len(unsplit.tokenizer.encode("maybe so"))


@torch.inference_mode()
def unsplit_logprob(unsplit, turns, choice):
    inputs = unsplit.inputs(turns)
    ids = torch.tensor([unsplit.tokenizer.encode(choice)])
    length = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
    inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, ids.shape[1]))
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    logits = unsplit.model(**inputs).logits[0, length - 1 : -1].log_softmax(-1)
    return float(logits.gather(-1, ids[0, :, None]).sum())


async def test_images_scored_alone_are_the_same_bits_in_one_call_or_several(checkpoint_path, tower, tmp_path):
    turns = [("user", [image, question]) for question in ("Cat?", "Or else?") for image in (CAT, CUP, MAN)]
    url = f"file://{tmp_path}/store"
    messages = await store_images(url, tower, turns)
    items = [
        language_pb2.ScoreItem(id=str(number), messages=[message], choices=["yes", "no", "maybe so"])
        for number, message in enumerate(messages)
    ]
    # in bfloat16, company shows
    async with running(checkpoint_path, tmp_path, store=url, dtype="bfloat16") as client:
        whole = await client.score(language_pb2.ScoreRequest(items=items, isolated=True), timeout=60)
        assert [result.id for result in whole.results] == [item.id for item in items]
        for image in range(3):
            request = language_pb2.ScoreRequest(items=items[image::3], alone=True)  # its former name
            apart = await client.score(request, timeout=60)
            for one, other in zip(whole.results[image::3], apart.results, strict=True):
                assert [each.logprob for each in one.scores.choices] == [each.logprob for each in other.scores.choices]


@pytest.mark.parametrize("isolated", [False, True])
async def test_one_items_error_is_its_own(client, tower, tmp_path, isolated):
    message = await with_image(tower, tmp_path, "Cat?")
    reference, _ = tower.record(CUP)
    foreign = user("Cat?", reference)
    foreign.parts[1].image.fingerprint = "e" * 64
    items = {
        "fine": (message, ["yes", "no"]),
        "lost": (user("Cup?", reference), ["yes", "no"]),
        "foreign": (foreign, ["yes", "no"]),
        "no choices": (message, []),
        "bad role": (user("hi", role="robot"), ["yes"]),
        "too long": (user("word " * 40_000), ["yes"]),
        "text": (user("hi"), ["yes", "no"]),
    }
    request = [language_pb2.ScoreItem(id=name, messages=[m], choices=choices) for name, (m, choices) in items.items()]
    reply = await client.score(language_pb2.ScoreRequest(items=request, isolated=isolated), timeout=60)
    kinds = {result.id: result.error.kind for result in reply.results}
    assert kinds == {
        "fine": 0,
        "lost": common_pb2.EMBEDDING_MISSING,
        "foreign": common_pb2.FINGERPRINT_MISMATCH,
        "no choices": common_pb2.INVALID_ARGUMENT,
        "bad role": common_pb2.INVALID_ARGUMENT,
        "too long": common_pb2.CONTEXT_LENGTH_EXCEEDED,
        "text": 0,
    }


async def failure(client, request, timeout=60.0):
    with pytest.raises(LookonceError) as caught:
        await answers(client, request, timeout)
    return caught.value


async def test_refusals_before_any_work(client, tower):
    reference, _ = tower.record(CUP)
    lost = await failure(client, asking(user("What?", reference)))
    assert lost.kind is ErrorKind.EMBEDDING_MISSING
    message = user("What?", reference)
    message.parts[1].image.fingerprint = "e" * 64
    error = await failure(client, asking(message))
    assert error.kind is ErrorKind.FINGERPRINT_MISMATCH
    assert "e" * 64 in error.message
    assert tower.fingerprint in error.message
    for words in (40_000, 190_000):
        error = await failure(client, asking(user("word " * words)))
        assert (error.kind, error.param) == (ErrorKind.CONTEXT_LENGTH_EXCEEDED, "messages")
        assert "32768" in error.message and "less text" in error.message
    assert "950000 characters" in error.message
    error = await failure(client, asking(user("hi"), temperature=3.0))
    assert (error.kind, error.param) == (ErrorKind.INVALID_ARGUMENT, "temperature")
    assert (await client.describe()).generated_tokens == 0


def endless(**changes):
    return asking(user("Go on"), max_tokens=8000, ignore_eos=True, **changes)


async def idle(client):
    """Wait until nothing runs and nothing waits; then what was generated so far."""
    while True:
        told = await client.describe()
        if not told.running and not told.waiting:
            return told.generated_tokens
        await asyncio.sleep(0.01)


async def test_a_client_that_goes_away_frees_its_place_within_a_step(client):
    stream = client.generate(endless(), timeout=60)
    async for _ in stream:
        break
    assert (await client.describe()).running == 1
    await stream.aclose()
    stopped = await idle(client)
    assert stopped < 8000
    await asyncio.sleep(0.05)
    assert (await client.describe()).generated_tokens == stopped


async def test_a_deadline_ends_the_work(client):
    request = endless()
    request.timeout = 0.3
    error = await failure(client, request)
    assert error.kind is ErrorKind.DEADLINE_EXCEEDED
    assert await idle(client) < 8000


async def test_more_than_may_wait_are_refused_at_once(client):
    async def first(stream):
        async for _ in stream:
            break

    busy = [client.generate(endless(), timeout=60) for _ in range(2)]
    await asyncio.gather(*(first(stream) for stream in busy))
    waiting = asyncio.create_task(answer(client, asking(user("hi"), max_tokens=2)))
    while (await client.describe()).waiting == 0:  # noqa: ASYNC110  # another task's state, behind a socket
        await asyncio.sleep(0.01)
    error = await failure(client, asking(user("hi")))
    assert error.kind is ErrorKind.OVERLOADED
    assert error.retry_after
    queued = asking(user("hi"))
    for stream in busy:
        await stream.aclose()
    assert (await waiting).finish.receipt.queue_ms > 0
    assert (await answer(client, queued)).finish is not None


async def test_a_deadline_counts_while_waiting_too(client):
    busy = [client.generate(endless(), timeout=60) for _ in range(2)]
    for stream in busy:
        await anext(stream)
    request = asking(user("hi"))
    request.timeout = 0.2
    assert (await failure(client, request)).kind is ErrorKind.DEADLINE_EXCEEDED
    for stream in busy:
        await stream.aclose()
    assert await idle(client) < 16000


async def test_the_end_of_the_context_ends_an_answer(checkpoint_path, tmp_path):
    async with running(checkpoint_path, tmp_path, context_length=80) as client:
        reply = await answer(client, asking(user("Go on"), max_tokens=80, ignore_eos=True))
        assert reply.finish.reason == language_pb2.LENGTH
        assert reply.finish.usage.prompt_tokens + len(reply.ids) == 80
        unbounded = language_pb2.GenerateRequest(
            messages=[user("Go on")], sampling=language_pb2.SamplingParameters(ignore_eos=True)
        )
        assert (await answer(client, unbounded)).ids == reply.ids
        for more in (81, 2**32 - 1):
            assert (await answer(client, asking(user("Go on"), max_tokens=more, ignore_eos=True))).ids == reply.ids
        late = await answer(client, asking(user("Go on"), max_tokens=2**32 - 1, min_tokens=2**32 - 1))
        assert (late.finish.reason, len(late.ids)) == (language_pb2.LENGTH, len(reply.ids))


async def test_least_tokens_are_those_of_the_unsplit_model(checkpoint_path, unsplit, tmp_path):
    """With a token for the end of turns that the model soon draws."""
    turns = [("user", ["Go on"])]
    plain = unsplit.answer_ids(turns, 12)
    end = next(token for at, token in enumerate(plain) if at >= 2 and token not in plain[:at])
    path = tmp_path / "model"
    shutil.copytree(checkpoint_path, path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    async with running(path, tmp_path) as client:
        lengths = set()
        for least in (0, 1, plain.index(end), plain.index(end) + 1, 10, 24):
            expected = unsplit.answer_ids(turns, 24, eos_token_id=end, min_new_tokens=least or None)
            reply = await answer(client, asking(user("Go on"), max_tokens=24, min_tokens=least))
            assert reply.ids == expected, least
            assert len(reply.ids) > least or len(reply.ids) == 24
            lengths.add(len(reply.ids))
        assert len(lengths) > 1 and plain.index(end) + 1 in lengths


async def test_forget_erases_the_embedding(client, tower, tmp_path):
    message = await with_image(tower, tmp_path, "What?")
    await answer(client, asking(message))
    reply = await client.forget(image_digests=[message.parts[0].image.image_digest])
    assert (reply.forgotten, reply.complete) == (2, True)  # the embedding and the prefix made from it
    assert (await failure(client, asking(message))).kind is ErrorKind.EMBEDDING_MISSING
    with pytest.raises(LookonceError, match="keys must be 32 bytes"):
        await client.forget(keys=[b"short"])


async def test_describe_tells_what_is_accepted(client, tower):
    told = await client.describe()
    assert tower.fingerprint in told.fingerprints
    assert len(told.fingerprints) == 3
    assert (told.model.family, told.model.dtype, told.model.device) == ("qwen2_vl", "float32", "cpu")
    assert told.model.checkpoint == tower.checkpoint.identity
    assert (told.context_length, told.max_tokens, told.max_running, told.max_waiting) == (32768, 8192, 2, 1)


async def test_one_accepted_encoder_dtype(checkpoint_path, tower, tmp_path):
    async with running(checkpoint_path, tmp_path, encoder_dtype="bfloat16") as client:
        reference, _ = tower.record(CUP)
        assert (await failure(client, asking(user(reference)))).kind is ErrorKind.FINGERPRINT_MISMATCH
        assert len((await client.describe()).fingerprints) == 1
