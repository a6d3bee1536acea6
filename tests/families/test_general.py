"""Checkpoints without a family of their own are served by the general path, and answer as their unsplit models do."""

from __future__ import annotations

import asyncio
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING

from lm_service.engine.answer import Detokenizer
from lm_service.engine.packed.engine import PackedEngine
from lm_service.engine.packed.options import PackedOptions
from lm_service.engine.packed.prefix_cache.content import common_length, prompt_contents
from lm_service.engine.types import ScoreItem, Scoring
from lm_service.prompt import Message, Turn, load_template
from lookonce.core.errors import CheckpointError, LookonceError
from lookonce.models.checkpoint.check import check_checkpoint, open_checked
from lookonce.models.checkpoint.checkpoint import open_checkpoint
from lookonce.models.family import Half
from lookonce.models.general.decoder import GeneralText
from lookonce.models.general.processor import Processor
from lookonce.models.general.prompts import ImageTexts
from lookonce.models.registry import family_of
from tests.cli.commands import invoke
from tests.engine.lab import Album, ask, generation
from tests.families.models_page import No, Served
from tests.families.split_general import CPU, Split
from tests.families.tiny_checkpoints import FAMILIES, make
from tests.families.unsplit_general import Unsplit
from tests.images import photograph
from tests.system.cluster import System, data_url, encoded, image_part, text_part

IMAGE, OTHER = photograph("chelsea", (150, 100)), photograph("coffee", (64, 96))
QUESTION, CHOICES = "what is on this image?", ["yes", "no", "a cat"]
THROUGH_REST = "llava"


def served(models, model_type):
    """What `test_every_family` holds for each."""
    return Served(
        models,
        model_type,
        split="test_every_family",
        packed="test_every_family",
        prefix="test_every_family",
        scores="test_every_family",
        video=No("families/test_models_page.py::test_video_is_no_part_of_a_chat"),
        quantised=No("test_int8_is_refused"),
    )


SERVED = (
    served("GLM-4.1V 9B", "glm4v"),
    served("BLIP-2 with OPT", "blip-2"),
    served("Idefics3 8B", "idefics3"),
    served("InternVL 2.5, 3 and 3.5 as transformers saves them", "internvl"),
    served("LLaVA 1.5 7B, 13B; Pixtral 12B as transformers saves it", "llava"),
    served("LLaVA-NeXT", "llava_next"),
    served("LLaVA-OneVision 0.5B, 7B, 72B", "llava_onevision"),
    served("Mistral Small 3.1, 3.2", "mistral3"),
    served("SmolVLM, SmolVLM2", "smolvlm"),
    served("ViP-LLaVA 7B, 13B", "vipllava"),
)


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make(THROUGH_REST, tmp_path_factory.mktemp("general") / THROUGH_REST)


@pytest.fixture(scope="module")
def unsplit(checkpoint, patch):
    return Unsplit(checkpoint, patch)


@pytest.fixture(scope="module")
def halves(checkpoint):
    out = checkpoint.with_name("halves")
    done = invoke("split", checkpoint, out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def system(halves, tmp_path_factory):
    with System(halves, tmp_path_factory.mktemp("system")) as one:
        yield one


def user(*parts):
    return [("user", list(parts))]


def test_questions_and_choices_about_one_encode(system, unsplit):
    image = system.upload(encoded(IMAGE))
    asked = [QUESTION, "how many cats are there?", {"text": QUESTION, "choices": CHOICES}]
    first, second, weighed = system.ask(image["id"], asked, temperature=0, max_tokens=12)
    assert [first["text"], second["text"]] == [unsplit.answer(user(IMAGE, text)) for text in asked[:2]]
    assert weighed["choices"] == pytest.approx(unsplit.weighed(CHOICES, user(IMAGE, QUESTION)), abs=1e-4)
    assert first["usage"]["prompt_tokens"] == unsplit.inputs(user(IMAGE, QUESTION))["input_ids"].shape[1]
    (again,) = system.ask(image["id"], ["why?"], temperature=0, max_tokens=12)
    assert again["text"] == unsplit.answer(user(IMAGE, "why?")) and again["receipt"]["prefix"] == "hit"
    assert system.encodes() == 1


def test_several_images_and_turns(system, unsplit):
    turns = [
        ("system", ["answer the question"]),
        ("user", ["what is on this image?", IMAGE]),
        ("assistant", ["a cat"]),
        ("user", [OTHER, "and on this?"]),
    ]
    messages = [
        {
            "role": role,
            "content": [
                text_part(part) if isinstance(part, str) else image_part(data_url(encoded(part))) for part in parts
            ],
        }
        for role, parts in turns
    ]
    reply = system.chat(messages, max_tokens=12)
    assert reply["choices"][0]["message"]["content"] == unsplit.answer(turns)


def test_each_half_holds_its_own_tensors(checkpoint, halves):
    stored = load_file(checkpoint / "model.safetensors")
    held = {half: set(load_file(next((halves / half).glob("*.safetensors")))) for half in Half}
    assert held[Half.VISION] | held[Half.LANGUAGE] == set(stored)
    assert not any("vision_tower" in name or "projector" in name for name in held[Half.LANGUAGE])
    assert all("vision_tower" in name or "projector" in name for name in held[Half.VISION])


def test_plan_and_doctor_know_it(checkpoint, tmp_path):
    done = invoke("doctor", "--model", checkpoint, "--data-dir", tmp_path, "--port", "0", "--json")
    found = {finding["check"]: finding for finding in json.loads(done.stdout)}
    assert found["checkpoint"]["status"] == "ok" and "whole, both halves" in found["checkpoint"]["detail"]
    done = invoke("plan", "--model", checkpoint, "--ram", "4", "--image", "150x100")
    assert done.returncode == 0 and "16 tokens (150x100)" in done.stdout, done.stdout + done.stderr


NOT_SERVED = {
    "mllama": "it takes no image features computed elsewhere",
    "lfm2_vl": "transformers has its image processor for torchvision only",
}


@pytest.mark.parametrize("model_type", NOT_SERVED)
def test_what_is_not_served_is_said_by_name(model_type, tmp_path):
    config = CONFIG_MAPPING[model_type]().to_dict() | {"model_type": model_type}
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    (tmp_path / "preprocessor_config.json").write_text("{}")
    told = check_checkpoint(str(tmp_path)).problems
    assert sum("is not served by the general path" in problem for problem in told) == 1
    assert any(NOT_SERVED[model_type] in problem for problem in told), told


UNPACKED = {
    "instructblip": "its Q-Former reads the question",
}


@pytest.mark.parametrize("model_type", UNPACKED)
def test_what_can_not_be_run_packed_is_said_by_name(model_type):
    """The plain engine serves it (test_plain.py)."""
    config = CONFIG_MAPPING[model_type]().to_dict() | {"model_type": model_type}
    assert UNPACKED[model_type] in family_of(config).unpacked(config)


def test_a_step_that_differs_from_the_class_is_refused(checkpoint, monkeypatch):
    forward = GeneralText.forward
    monkeypatch.setattr(
        GeneralText, "forward", lambda self, x, at, *rest, **named: forward(self, x, at // 2, *rest, **named)
    )
    with pytest.raises(CheckpointError, match="the packed step of the general path differs from the class's own"):
        Split(checkpoint)


@pytest.mark.parametrize("file", ["preprocessor_config.json", "tokenizer_config.json"])
def test_code_of_a_repository_is_refused_by_name(file, checkpoint, tmp_path):
    path = shutil.copytree(checkpoint, tmp_path / "model")
    field = "image_processor_type" if file.startswith("pre") else "tokenizer_class"
    settings = json.loads((path / file).read_text()) | {field: "OwnThing", "auto_map": {"AutoX": "own.OwnThing"}}
    (path / file).write_text(json.dumps(settings))
    told = check_checkpoint(str(path)).problems
    assert any(f"{field} 'OwnThing' is code of the repository, which is never run" in each for each in told), told


def test_an_image_among_others_has_rows_of_its_own(tmp_path, monkeypatch):
    """LLaVA-OneVision cuts no tiles where a prompt has several images: one embedding holds both forms."""
    path = make("llava_onevision", tmp_path / "model")
    split, unsplit = Split(path), Unsplit(path, monkeypatch)
    (one, rows), (other, others) = split.encoded(IMAGE, 1), split.encoded(OTHER, 2)
    alone, both = ([Message("user", (*images, QUESTION))] for images in ([one], [one, other]))
    prompts = [split.prompts.build(messages) for messages in (alone, both)]
    assert [span.tokens for prompt in prompts for span in prompt.images] == [len(rows) - 17, 17, 17]
    for prompt, images in zip(prompts, ([IMAGE], [IMAGE, OTHER]), strict=True):
        turns = user(*images, QUESTION)
        assert list(prompt.token_ids) == unsplit.inputs(turns)["input_ids"][0].tolist()
        answer, told = split.answer(prompt, {one: rows, other: others}, 6)
        torch.testing.assert_close(told, unsplit.logprobs(turns, answer), atol=2e-4, rtol=0)
    plain, among = (prompt_contents([prompt])[0].head.columns for prompt in prompts)
    assert common_length(plain, among) == prompts[0].images[0].start
    fingerprint = open_checkpoint(str(path)).encoder_spec("float32").fingerprint()
    monkeypatch.setattr(Processor, "_is_another_among_others", lambda *_: False)
    one_form = open_checkpoint(str(path)).encoder_spec("float32").fingerprint()
    assert one_form != fingerprint, "embeddings of one form, as before there were two, are others"


def test_several_images_that_are_written_otherwise_than_each_alone_are_refused(checkpoint, monkeypatch):
    monkeypatch.setattr(ImageTexts, "_agrees", lambda *_: False)
    split = Split(checkpoint)
    references = [split.encoded(image, number)[0] for number, image in enumerate((IMAGE, OTHER))]
    assert split.prompts.build([Message("user", (references[0], QUESTION))])
    with pytest.raises(LookonceError, match="ask about one image at a time"):
        split.prompts.build([Message("user", (*references, QUESTION))])


def test_a_processor_that_writes_more_than_images_is_refused(checkpoint, monkeypatch):
    """Never served with other tokens than its own processor's."""
    ids = Processor.ids
    monkeypatch.setattr(
        Processor, "ids", lambda self, sizes, text: ((made := ids(self, sizes, text))[0] + [5], made[1])
    )
    told = check_checkpoint(str(checkpoint)).problems
    assert any("writes more into a prompt than what an image is" in each for each in told), told


def test_int8_is_refused(checkpoint):
    vision = open_checked(str(checkpoint), Half.VISION)
    with pytest.raises(CheckpointError, match="the general path, which has no int8 weights; leave out --quantization"):
        vision.family.load_encoder(vision, torch.float32, CPU, quantization="int8")


@pytest.mark.parametrize("ids", [[386, 75, 264], [70, 0, 407, 220, 264], [198, 174, 2, 385], [290, 300, 14], [13]])
def test_sentencepiece_is_read_as_its_library_reads_it(ids, checkpoint, unsplit):
    """Bytes that are no character, ids without a token, special tokens, a space that begins the text."""
    table = load_template(checkpoint, family_of(json.loads((checkpoint / "config.json").read_text()), checkpoint)).table
    detokenizer = Detokenizer(table)
    text = "".join(detokenizer.push(number) for number in ids) + detokenizer.flush()
    assert text == unsplit.tokenizer.decode(ids, skip_special_tokens=True)


def test_tokens_of_llamas_older_files_are_the_same(checkpoint, unsplit, tmp_path, monkeypatch):
    """Where a normaliser, and no pre-tokeniser, writes the space before a text: before every piece between tokens."""
    path = shutil.copytree(checkpoint, tmp_path / "model")
    stated = json.loads((path / "tokenizer.json").read_text())
    steps = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    stated |= {"normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None}
    (path / "tokenizer.json").write_text(json.dumps(stated))
    family = family_of(json.loads((path / "config.json").read_text()), path)
    ids = load_template(path, family).ids([Turn("user", (None, "Zoë, why? 12"))])
    at = ids.index(family.texts.image_id)
    older = Unsplit(path, monkeypatch).inputs(user(IMAGE, "Zoë, why? 12"))["input_ids"][0].tolist()
    assert ids[:at] + [family.texts.image_id] * 16 + ids[at + 1 :] == older
    assert older != unsplit.inputs(user(IMAGE, "Zoë, why? 12"))["input_ids"][0].tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["llava", "smolvlm", "internvl", "llava_onevision", "llava_next", "mistral3", "blip2"]
)
def test_what_a_processor_config_leaves_out_follows_from_config_json(family, tmp_path):
    path = make(family, tmp_path / family)
    stated = Split(path).encoded(IMAGE, 1)[0]
    (path / "processor_config.json").unlink()
    split = Split(path)  # whose rows are held to its tokens
    reference, _ = split.encoded(IMAGE, 1)
    assert reference == stated and split.prompts.build([Message("user", (reference, QUESTION))])


class Shelf(Album):
    """An EmbeddingLoader of some images."""

    def __init__(self, encoded):
        super().__init__(encoded[0][1].shape[1])
        by_key = {reference.key: rows for reference, rows in encoded}
        self.rows = lambda reference: by_key[reference.key]


AT_ONCE = ("smolvlm",)
"""Of tiles and markers; the others are for `make test-slow`."""


@pytest.mark.parametrize(
    "family", [name if name in AT_ONCE else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # within GLM's own processor
async def test_every_family(family, tmp_path, monkeypatch):
    await check_packed(make(family, tmp_path / family), monkeypatch)


async def check_packed(path, monkeypatch, *, prefix_reuse=True):
    """Answers and scores of the packed engine, several questions at once, are those of the unsplit model."""
    unsplit, split = Unsplit(path, monkeypatch), Split(path)
    encoded = [split.encoded(image, number) for number, image in enumerate((IMAGE, OTHER))]
    shelf, vocabulary = Shelf(encoded), split.model.shape.vocabulary
    options = PackedOptions(kv_bytes=8 << 20, prefix_bytes=8 << 20, step_tokens=37, burst_tokens=37)
    engine = PackedEngine(split.model, split.template.table, frozenset(), options)
    references = {id(image): one for image, (one, _) in zip((IMAGE, OTHER), encoded, strict=True)}

    async def check(*asked):
        """Every token's whole distribution is that of the unsplit model."""
        *images, text = asked
        prompt = split.prompts.build([Message("user", (*(references[id(image)] for image in images), text))])
        turns = user(*images, text)
        assert list(prompt.token_ids) == unsplit.inputs(turns)["input_ids"][0].tolist()
        (answer,) = await ask(engine, generation(prompt, 8, logprobs=vocabulary))
        expected = unsplit.logprobs(turns, answer.tokens)[:-1]
        for row, token, given in zip(expected, answer.tokens, answer.logprobs, strict=True):
            told = torch.tensor([value for _, value in sorted(given.top)])
            torch.testing.assert_close(told, row, atol=2e-4, rtol=0)
            assert token == int(row.argmax())
        return answer.finish.timings

    await engine.start(shelf)
    try:
        several = [check(IMAGE, OTHER, QUESTION)] if split.takes_several else []
        each = [check(image, text) for image in (IMAGE, OTHER) for text in (QUESTION, "why?")]
        await asyncio.gather(*each, *several)
        later = [await check(image, "how many cats are there?") for image in (IMAGE, OTHER)]
        assert all(timings.prefix_hit is prefix_reuse for timings in later)
        most = 1 + len(several) if prefix_reuse else 100
        assert all(shelf.loads[reference.key] <= most for reference in references.values())
        choices = ((5,), (7, 9))
        prompt = split.prompts.build([Message("user", (references[id(IMAGE)], QUESTION))])
        scored = await engine.score(Scoring("s", (ScoreItem(prompt, choices),)))
        for choice, given in zip(choices, scored.logprobs[0], strict=True):
            told = unsplit.logprobs(user(IMAGE, QUESTION), list(choice))
            weight = sum(float(row[token]) for row, token in zip(told, choice, strict=False))
            assert given == pytest.approx(weight, abs=4e-4)
    finally:
        await engine.close()
