"""What can't be run packed is served by the plain engine, and answers as the unsplit model does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from lm_service.app import load
from lm_service.engine.packed.options import PackedOptions
from lm_service.engine.plain.engine import PlainEngine
from lm_service.engine.types import ModelFacts, ScoreItem, Scoring
from lm_service.prompt import Message, PromptBuilder, load_template
from lm_service.settings import LanguageSettings
from lookonce.cli.model import resolve_model
from lookonce.core.errors import CheckpointError, ErrorKind, LookonceError
from lookonce.core.identity import EmbeddingReference
from lookonce.models.checkpoint.check import open_checked
from lookonce.models.family import Half, served_plain
from lookonce.models.general.decoder import GeneralText
from lookonce.models.general.unbatched import GeneralUnbatched
from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from lookonce.models.self_check import SelfCheckFailed
from tests.cli.commands import invoke
from tests.engine.lab import Album, ask, generation
from tests.families.models_page import No, Plain, Served
from tests.families.plain_checkpoints import PLAIN
from tests.families.tiny_checkpoints import make, make_tiny
from tests.families.unsplit_general import Unsplit
from tests.families.unsplit_plain import UnsplitBlip
from tests.images import photograph
from tests.system.cluster import System, encoded

IMAGE, OTHER = photograph("chelsea", (150, 100)), photograph("coffee", (64, 96))
QUESTION, CHOICES = "what is on this image?", ["yes", "no", "a cat"]
CONTEXT = 400
CPU = torch.device("cpu")
UNSPLIT = {"blip2_t5": UnsplitBlip, "instructblip": UnsplitBlip, "instructblip_t5": UnsplitBlip}


class Halves:
    """Both halves of a checkpoint in this process, each loaded as its service loads it."""

    def __init__(self, path):
        vision, language = (open_checked(str(path), half) for half in (Half.VISION, Half.LANGUAGE))
        self.encoder = vision.family.load_encoder(vision, torch.float32, CPU)
        self.encoder.warm_up()
        self.model = language.family.load_unbatched(language, torch.float32, CPU, context=CONTEXT)
        family = language.family
        self.template = load_template(path, family, family.special_tokens(language.config).marker)
        limits = {"context_length": CONTEXT, "max_images": 4, "check_fingerprint": lambda reference: None}
        self.prompts = PromptBuilder(self.template, family, language.config, **limits)
        self.kept = {}

    def encoded(self, image, number):
        """A reference to an image whose rows the loader has."""
        (rows,) = self.encoder.encode([prepared := self.encoder.prepare(image, 1, 10**8)])
        key = bytes([number]) * 32
        self.kept[key] = rows
        return EmbeddingReference(key, "0" * 64, key, prepared.grid_thw, len(rows), *image.size)

    def prompt(self, *parts):
        """Of one message."""
        return self.prompts.build([Message("user", parts)])

    @contextlib.asynccontextmanager
    async def engine(self, **bounds):
        """A started engine."""
        facts = ModelFacts(CONTEXT, "float32", "cpu", engine="plain")
        engine = PlainEngine(self.model, self.template.table, frozenset(), CONTEXT, PackedOptions(**bounds), facts)
        self.album = Album(0)
        self.album.rows = lambda reference: self.kept[reference.key]
        await engine.start(self.album)
        try:
            yield engine
        finally:
            await engine.close()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Made when they are asked for."""
    made = {}

    def of(family):
        if family not in made:
            made[family] = make_tiny(PLAIN[family], tmp_path_factory.mktemp("plain") / family)
        return made[family]

    return of


@pytest.fixture(scope="module")
def halves(checkpoints):
    """Of the smallest, for what any of them shows."""
    halves = Halves(checkpoints("blip2_t5"))
    halves.reference = halves.encoded(IMAGE, 1)
    return halves


def served(models, model_type):
    """What `test_every_family` holds for each."""
    return Served(
        models,
        model_type,
        split="test_every_family",
        packed=Plain("test_every_family"),
        prefix=No("test_ten_questions_after_a_restart_cost_one_encode"),
        scores="test_every_family",
        video=No("families/test_models_page.py::test_video_is_no_part_of_a_chat"),
        quantised=No("test_the_engine_is_chosen_at_start_and_says_why"),
    )


SERVED = (
    served("BLIP-2 with Flan-T5", "blip-2"),
    served("InstructBLIP with Vicuna or Flan-T5", "instructblip"),
)
AT_ONCE = ("instructblip_t5", "soft_caps")
"""The others are for `make test-slow`."""


@pytest.mark.parametrize(
    "family", [name if name in AT_ONCE else pytest.param(name, marks=pytest.mark.slow) for name in PLAIN]
)
async def test_every_family(family, checkpoints, monkeypatch):
    path = checkpoints(family)
    unsplit, halves = UNSPLIT.get(family, Unsplit)(path, monkeypatch), Halves(path)
    pairs = [(image, halves.encoded(image, number)) for number, image in enumerate((IMAGE, OTHER))]
    vocabulary = halves.model.shape.vocabulary

    async def check(image, reference, text):
        """Every token's whole distribution is that of the unsplit model."""
        prompt, turns = halves.prompt(reference, text), [("user", [image, text])]
        assert list(prompt.token_ids) == unsplit.inputs(turns)["input_ids"][0].tolist()
        (answer,) = await ask(engine, generation(prompt, 8, logprobs=vocabulary))
        expected = unsplit.logprobs(turns, answer.tokens)[:-1]
        for row, token, given in zip(expected, answer.tokens, answer.logprobs, strict=True):
            told = torch.tensor([value for _, value in sorted(given.top)])
            torch.testing.assert_close(told, row, atol=2e-4, rtol=0)
            assert token == int(row.argmax())
        greedy = unsplit.answer_ids(turns, 8)
        assert answer.tokens[: len(greedy)] == greedy

    async with halves.engine() as engine:
        await asyncio.gather(*(check(*pair, text) for pair in pairs for text in (QUESTION, "why?")))
        (image, reference), choices = pairs[0], ((5,), (7, 9), (7, 9, 11), (7,))
        scored = await engine.score(Scoring("s", (ScoreItem(halves.prompt(reference, QUESTION), choices),)))
        for choice, given in zip(choices, scored.logprobs[0], strict=True):
            told = unsplit.logprobs([("user", [image, QUESTION])], list(choice))
            weight = sum(float(row[token]) for row, token in zip(told, choice, strict=False))
            assert given == pytest.approx(weight, abs=4e-4)


@pytest.mark.parametrize("family", ["blip2_t5", "instructblip"])
async def test_a_caption_is_what_the_class_says_to_an_image_alone(family, checkpoints, monkeypatch):
    unsplit, halves = UnsplitBlip(checkpoints(family), monkeypatch), Halves(checkpoints(family))
    prompt = halves.prompt(halves.encoded(IMAGE, 1))
    async with halves.engine() as engine:
        (answer,) = await ask(engine, generation(prompt, 8))
    assert answer.tokens == unsplit.caption_ids(IMAGE, 8)


@pytest.mark.slow
async def test_several_images_and_turns(checkpoints, monkeypatch):
    unsplit, halves = Unsplit(checkpoints("short_window"), monkeypatch), Halves(checkpoints("short_window"))
    first, second = (halves.encoded(image, number) for number, image in enumerate((IMAGE, OTHER)))
    asked = [("user", (first, "what is on this image?")), ("assistant", ("a cat",)), ("user", (second, "and on this?"))]
    pictured = {first: IMAGE, second: OTHER}
    turns = [(role, [pictured.get(part, part) for part in parts]) for role, parts in asked]
    async with halves.engine() as engine:
        prompt = halves.prompts.build([Message(role, parts) for role, parts in asked])
        (answer,) = await ask(engine, generation(prompt, 8))
    assert answer.tokens == unsplit.answer_ids(turns, 8)


async def test_sampling_means_what_it_means_in_the_packed_engine(halves):
    prompt, drawn = halves.prompt(halves.reference, QUESTION), {"temperature": 1.5, "seed": 7}
    async with halves.engine() as engine:
        whole = await ask(engine, generation(prompt, 12, n=2, **drawn))
        again = await ask(engine, generation(prompt, 12, n=2, **drawn))
        (once,) = await ask(engine, generation(prompt, 12, repetition_penalty=1.3))
        (plain,) = await ask(engine, generation(prompt, 12))
        (short,) = await ask(engine, generation(prompt, 12, stop=(plain.text[2:4],)))
    assert [answer.tokens for answer in whole] == [answer.tokens for answer in again]
    assert whole[0].tokens != whole[1].tokens and once.tokens != plain.tokens
    assert short.finish.stop == plain.text[2:4] and short.text == plain.text.partition(plain.text[2:4])[0]


async def test_a_cancelled_answer_ends_within_a_step_and_the_next_begins(halves):
    prompt = halves.prompt(halves.reference, QUESTION)
    async with halves.engine() as engine:
        async with contextlib.aclosing(engine.generate(generation(prompt, 300, ignore_eos=True))) as long:
            await anext(long)
            assert engine.describe().running == 1
        (answer,) = await ask(engine, generation(prompt, 3))
        state = engine.describe()
    assert len(answer.tokens) == 3 and state.generated_tokens < 200 and state.waiting == 0


async def test_one_request_at_a_time_and_a_bound_on_those_that_wait(halves):
    prompt = halves.prompt(halves.reference, QUESTION)
    async with halves.engine(max_waiting=2) as engine:
        halves.album.gate = asyncio.Event()
        asked = [asyncio.create_task(ask(engine, generation(prompt, 2))) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(LookonceError, match="2 requests are waiting already") as caught:
            await ask(engine, generation(prompt, 2))
        assert caught.value.kind is ErrorKind.OVERLOADED
        halves.album.gate.set()
        answers = [answer.tokens for [answer] in await asyncio.gather(*asked)]
    assert answers[0] == answers[1] == answers[2]


async def test_a_deadline_holds_in_the_queue_and_in_an_answer(halves):
    prompt = halves.prompt(halves.reference, QUESTION)
    async with halves.engine() as engine:
        for seconds in (0.0, 0.05):
            request = replace(generation(prompt, 390, ignore_eos=True), deadline=time.monotonic() + seconds)
            with pytest.raises(LookonceError, match="the deadline passed"):
                await ask(engine, request)
        item = ScoreItem(prompt, ((5,),))
        with pytest.raises(LookonceError, match="the deadline passed"):
            await engine.score(Scoring("s", (item,), deadline=time.monotonic() - 1))
        assert (await engine.score(Scoring("s", (item,)))).cached_tokens == (0,)


async def test_a_lost_embedding_is_the_askers_trouble_only(halves):
    prompt, other = halves.prompt(halves.reference, QUESTION), halves.prompt(halves.encoded(OTHER, 2), QUESTION)
    async with halves.engine() as engine:
        halves.album.lost.add(halves.reference.key)
        lost, answered = await asyncio.gather(
            ask(engine, generation(prompt, 2)), ask(engine, generation(other, 2)), return_exceptions=True
        )
    assert lost.kind is ErrorKind.EMBEDDING_MISSING and len(answered[0].tokens) == 2


async def test_faults_in_a_row_end_the_process_and_one_does_not(halves, monkeypatch):
    prompt, failed = halves.prompt(halves.reference, QUESTION), []
    async with halves.engine() as engine:
        await engine.start(halves.album, lambda: failed.append(True))
        monkeypatch.setattr(halves.model, "begin", lambda prompt: 1 / 0)
        for _ in range(2):
            with pytest.raises(LookonceError, match="could not compute this request"):
                await ask(engine, generation(prompt, 2))
        monkeypatch.undo()
        await ask(engine, generation(prompt, 2))
        monkeypatch.setattr(halves.model, "begin", lambda prompt: 1 / 0)
        for _ in range(3):
            assert not failed
            with pytest.raises(LookonceError, match="could not compute this request"):
                await ask(engine, generation(prompt, 2))
        await asyncio.sleep(0)
        with pytest.raises(LookonceError, match="shutting down"):
            await ask(engine, generation(prompt, 2))
    assert failed == [True]


async def test_a_text_that_the_qformer_can_not_read_is_refused(checkpoints):
    halves = Halves(checkpoints("instructblip_t5"))
    prompt = halves.prompt(halves.encoded(IMAGE, 1), "why? " * 40)
    async with halves.engine() as engine:
        with pytest.raises(LookonceError, match="82 tokens for the Q-Former, which reads 64: send less text"):
            await ask(engine, generation(prompt, 2))


def test_the_engine_is_chosen_at_start_and_says_why(checkpoints, monkeypatch, capsys):
    path = str(checkpoints("sinks"))
    told = load(LanguageSettings(model=path, device="cpu")).engine.describe().model
    assert (told.engine, told.engine_note) == ("plain", "its attention has s_aux")
    assert "served by the plain engine, one request at a time" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="can't be served by the packed engine: its attention has s_aux"):
        load(LanguageSettings(model=path, device="cpu", engine="packed"))
    with pytest.raises(LookonceError, match="the plain engine has no int8 weights: leave out --quantization"):
        load(LanguageSettings(model=path, device="cpu", quantization="int8"))


def test_a_packed_step_that_differs_is_served_by_the_plain_engine(tmp_path, monkeypatch):
    path = str(make("llava", tmp_path / "llava"))
    assert load(LanguageSettings(model=path, device="cpu")).engine.describe().model.engine == "packed"
    forward = GeneralText.forward
    monkeypatch.setattr(
        GeneralText, "forward", lambda self, x, at, *rest, **named: forward(self, x, at // 2, *rest, **named)
    )
    told = load(LanguageSettings(model=path, device="cpu")).engine.describe().model
    assert told.engine == "plain" and "the packed step of the general path differs" in told.engine_note
    monkeypatch.setattr(GeneralUnbatched, "whole", lambda self, prompt, answer: torch.zeros(4, 408))
    with pytest.raises(SelfCheckFailed, match="its steps with a cache differ from its forward without one"):
        load(LanguageSettings(model=path, device="cpu"))


def test_a_family_of_its_own_has_no_plain_engine(tmp_path):
    path = make_random_checkpoint(tmp_path / "model")
    with pytest.raises(CheckpointError, match="Qwen2-VL is served by the packed engine only; leave out --engine"):
        load(LanguageSettings(model=str(path), device="cpu", engine="plain"))


def test_doctor_plan_and_up_say_it(checkpoints, tmp_path):
    path = checkpoints("instructblip_t5")
    said = "served by the plain engine, one request at a time and no prefix shared: its language model is an encoder"
    done = invoke("doctor", "--model", path, "--data-dir", tmp_path, "--port", "0", "--json")
    found = {finding["check"]: finding for finding in json.loads(done.stdout)}
    assert found["checkpoint"]["status"] == "ok" and said in found["engine"]["detail"]
    done = invoke("plan", "--model", path, "--ram", "4", "--image", "150x100")
    assert done.returncode == 0 and said in done.stdout, done.stdout + done.stderr
    assert served_plain(resolve_model(str(path)).unpacked).startswith(said)  # what `up` notes


@pytest.mark.slow
def test_ten_questions_after_a_restart_cost_one_encode(checkpoints, tmp_path, monkeypatch):
    """Of a model whose Q-Former reads each of them."""
    path = checkpoints("instructblip")
    unsplit = UnsplitBlip(path, monkeypatch)
    done = invoke("split", path, tmp_path / "halves")
    assert done.returncode == 0, done.stderr
    held = {half: set(load_file(next((tmp_path / "halves" / half).glob("*.safetensors")))) for half in Half}
    assert all(name.startswith("vision_model.") for name in held[Half.VISION])
    assert {"query_tokens", "language_projection.weight"} < held[Half.LANGUAGE]
    asked = [f"why {word}?" for word in ("a cat", "a dog", "red", "this", "there")]
    further = [f"how many {word}?" for word in ("cats", "dogs", "there", "are", "red")]

    def expected(texts):
        return [unsplit.answer([("user", [IMAGE, text])], 8) for text in texts]

    with System(tmp_path / "halves", tmp_path / "system") as system:
        image = system.upload(encoded(IMAGE))
        weighed = {"text": QUESTION, "choices": CHOICES}
        *answers, scored = system.ask(image["id"], [*asked, weighed], temperature=0, max_tokens=8)
        assert [answer["text"] for answer in answers] == expected(asked)
        assert scored["choices"] == pytest.approx(unsplit.weighed(CHOICES, [("user", [IMAGE, QUESTION])]), abs=1e-4)
        prompt = unsplit.inputs([("user", [IMAGE, asked[0]])])["input_ids"]
        assert answers[0]["usage"]["prompt_tokens"] == prompt.shape[1]
        assert {answer["receipt"]["prefix"] for answer in answers} == {"miss"}
        assert system.http.get("/v1/models").json()["data"][0]["engine"] == "plain"
        for service in (*system.languages, *system.visions):
            service.restart()
        system.wait_whole()
        again = system.ask(image["id"], further, temperature=0, max_tokens=8)
        assert [answer["text"] for answer in again] == expected(further)
        assert system.encodes() == 0  # since they were started anew
