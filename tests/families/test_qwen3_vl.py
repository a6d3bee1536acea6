"""Qwen3-VL: its tower and deepstack are transformers' own, and its halves answer as the unsplit model does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from lm_service.engine.packed.device_map import Home
from lm_service.engine.packed.engine import PackedEngine
from lm_service.engine.packed.options import PackedOptions
from lm_service.engine.types import EmbeddingSource
from lm_service.prompt import Message, PromptBuilder, load_template
from lookonce.core.errors import CheckpointError, ErrorKind, LookonceError
from lookonce.core.identity import EmbeddingReference, embedding_key, image_digest
from lookonce.core.record import EmbeddingRecord, tensor_names
from lookonce.core.stores import open_store
from lookonce.models.checkpoint import Half, open_checkpoint
from lookonce.models.checkpoint.check import check_checkpoint
from lookonce.models.qwen2_vl.architecture import tensor_shapes
from lookonce.models.qwen3_vl.architecture import SIZES
from lookonce.models.qwen3_vl.config import FAMILY
from lookonce.models.qwen3_vl.synthetic import make_random_checkpoint
from lookonce.models.qwen3_vl.vision import DeepstackEncoder
from lookonce.models.sizing import RECORD_BYTES, size_of
from lookonce.models.tensors import view_of, views_of
from tests import standin
from tests.cli.commands import invoke
from tests.engine.lab import ask, generation
from tests.families.models_page import No, Served
from tests.images import odd_files, photograph, save
from tests.lm.split import answer, asking, encoded, running, user
from tests.system.cluster import System, data_url, image_part, text_part
from tests.unsplit import Unsplit
from vision_service.app import build, load
from vision_service.images import Decoder, ImageLimits
from vision_service.settings import VisionSettings

CPU = torch.device("cpu")
SIDES = [(57, 200), (64, 64), (300, 200), (33, 31), (200, 300), (448, 336), (1000, 64), (256, 128)]
BOUNDS = 3136, 200_000
SERVED = Served(
    "Qwen3-VL 2B, 4B, 8B, 32B",
    "qwen3_vl",
    split="test_images_of_every_kind_are_answered_about_after_one_encode",
    packed="test_packed_answers_are_the_unsplit_models",
    prefix="test_ten_questions_are_one_encode_and_scores_are_the_unsplit_models",
    scores="test_ten_questions_are_one_encode_and_scores_are_the_unsplit_models",
    video=No("families/test_models_page.py::test_video_is_no_part_of_a_chat"),
    quantised="test_int8_layers_are_near_the_exact_ones",
)
QUESTION, CHOICES = "What is on it?", ["yes", "no", "a cat"]
MAX_PIXELS = 150 * 32 * 32

VISION = {
    "deepstack_visual_indexes": [8, 16, 24],
    "depth": 27,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "in_channels": 3,
    "initializer_range": 0.02,
    "intermediate_size": 4304,
    "model_type": "qwen3_vl",
    "num_heads": 16,
    "num_position_embeddings": 2304,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
SMALL_VISION = {"deepstack_visual_indexes": [5, 11, 17], "depth": 24, "hidden_size": 1024, "intermediate_size": 4096}
TEXT = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "dtype": "bfloat16",
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 262144,
    "model_type": "qwen3_vl_text",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
    "rope_theta": 5000000,
    "use_cache": True,
    "vocab_size": 151936,
}
OUTER = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "image_token_id": 151655,
    "model_type": "qwen3_vl",
    "transformers_version": "4.57.0.dev0",
    "video_token_id": 151656,
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
}
PUBLISHED = {  # hidden, ffn, heads, layers, tied
    "2B": (2048, 6144, 16, 28, True),
    "4B": (2560, 9728, 32, 36, True),
    "8B": (4096, 12288, 32, 36, False),
    "32B": (5120, 25600, 64, 64, False),
}
PREPROCESSOR = {
    "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessorFast",
}


def published(name):
    """config.json of Qwen3-VL-`name`-Instruct."""
    hidden, ffn, heads, layers, tied = PUBLISHED[name]
    text = {"hidden_size": hidden, "intermediate_size": ffn, "num_attention_heads": heads, "num_hidden_layers": layers}
    vision = VISION | (SMALL_VISION if tied else {}) | {"out_hidden_size": hidden}
    tie = {"tie_word_embeddings": tied}
    return OUTER | tie | {"text_config": TEXT | text | tie, "vision_config": vision}


@pytest.fixture(scope="module")
def photographs():
    """Images of SIDES."""
    return [photograph("astronaut" if at % 2 else "coffee", size) for at, size in enumerate(SIDES)]


@pytest.fixture(scope="module", params=["published", pytest.param("nested", marks=pytest.mark.slow)])
def checkpoint(request, tmp_path_factory):
    """A tiny model with its own head or the embedding's, rotary settings where either kind of save has them."""
    path = tmp_path_factory.mktemp(request.param) / "model"
    return make_random_checkpoint(path, layout=request.param, tied=request.param == "published", max_pixels=MAX_PIXELS)


@pytest.fixture(scope="module")
def unsplit(checkpoint):
    return Unsplit(checkpoint, system=None)


def encoder(path, dtype=torch.float32, **options):
    return DeepstackEncoder.load(open_checkpoint(str(path), needs=Half.VISION), dtype, CPU, **options)


def rows_of(tower, images):
    return tower.encode([tower.prepare(image, *BOUNDS) for image in images])


@torch.inference_mode()
def features(unsplit, image):
    """[1 + deepstack, tokens, hidden] by transformers."""
    unsplit.processor.size = {"shortest_edge": BOUNDS[0], "longest_edge": BOUNDS[1]}
    inputs = unsplit.processor(images=[image], return_tensors="pt")
    made = unsplit.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    return torch.stack([made.pooler_output[0], *(level[0] for level in made.deepstack_features)])


# The tower


@pytest.mark.parametrize("native", [True, False])
def test_tower_and_deepstack_are_those_of_transformers(checkpoint, photographs, native):
    tower, unsplit = encoder(checkpoint, native=native), Unsplit(checkpoint)
    assert tower.native == native
    for image, rows in zip(photographs, rows_of(tower, photographs), strict=True):
        expected = features(unsplit, image)
        assert len(expected) == 4 and expected.abs().amax((1, 2)).min() > 0.1
        torch.testing.assert_close(rows, expected, atol=2e-5, rtol=0)
        assert torch.equal(rows, rows_of(tower, [image])[0]) or not native


def test_levels_come_in_the_order_of_their_blocks(photographs, tmp_path):
    """Whatever the order that they are listed in, and however many there are."""
    for blocks in ((3, 0), (2,), ()):
        path = make_random_checkpoint(tmp_path / f"of {len(blocks)}", deepstack_blocks=blocks)
        names = open_checkpoint(str(path)).embedding_tensors
        assert names == tensor_names(len(blocks))
        expected, (rows,) = features(Unsplit(path), photographs[0]), rows_of(encoder(path), photographs[:1])
        torch.testing.assert_close(rows, expected, atol=2e-5, rtol=0)
        assert len(views_of(rows, names)) == len(names)


@pytest.mark.parametrize(
    ("dtype", "options", "least", "most"),
    [
        (torch.bfloat16, {}, 0, 0.05),
        (torch.float32, {"quantization": "int8"}, 1e-3, 0.1),
        (torch.float32, {"quantization": "int8", "native": False}, 1e-3, 0.1),
    ],
    ids=str,
)
def test_rounded_towers_are_near_the_exact_one(checkpoint, photographs, dtype, options, least, most):
    exact, made = rows_of(encoder(checkpoint), photographs), rows_of(encoder(checkpoint, dtype, **options), photographs)
    for rows, right in zip(made, exact, strict=True):
        assert rows.dtype is dtype
        for level, other in zip(rows, right, strict=True):
            assert least < (level.float() - other).norm() / other.norm() < most


# The engine


class Album:
    """An EmbeddingLoader of a checkpoint's own embeddings."""

    def __init__(self, path, images):
        self.checkpoint = open_checkpoint(str(path))
        tower = encoder(path)
        patches = [tower.prepare(image, self.checkpoint.min_pixels, self.checkpoint.max_pixels) for image in images]
        self.rows, self.references = {}, []
        for number, (one, rows) in enumerate(zip(patches, tower.encode(patches), strict=True), 1):
            key = bytes([number]) * 32
            tokens = rows.shape[1]
            self.references.append(EmbeddingReference(key, "0" * 64, key, one.grid_thw, tokens, one.width, one.height))
            self.rows[key] = rows.clone()  # to be changed outside of inference mode

    async def load(self, reference, rows_of=None):
        return self.rows[reference.key], EmbeddingSource.STORE


IMAGES = [photograph("chelsea", (225, 150)), photograph("coffee", (90, 140)), photograph("astronaut", (200, 260))]
CONVERSATIONS = [
    [("user", ["Who are you?"])],
    [("user", [0, QUESTION])],
    [("user", [0, "And what is this?"])],
    [("user", ["What is this?", 1])],
    [
        ("system", ["Answer in one word."]),
        ("user", [0, "What animal?", 2]),
        ("assistant", ["A cat."]),
        ("user", ["And here?", 1]),
    ],
]


@contextlib.asynccontextmanager
async def engine_over(path, home=None, *, native=True, quantization="none", **options):
    """A started engine over an album, and the prompts of CONVERSATIONS."""
    home = home or Home((CPU,), (range(4),))
    opened, album = open_checkpoint(str(path), needs=Half.LANGUAGE), Album(path, IMAGES)
    how = {"native": native, "quantization": quantization}
    where = home.of if quantization == "none" else home.of_unquantized
    model = opened.family.load_text(opened, torch.float32, where, home.of_layers, **how)
    template = load_template(path, opened.family)
    limits = {"context_length": 2000, "max_images": 4, "check_fingerprint": lambda reference: None}
    builder = PromptBuilder(template, opened.family, opened.config, **limits)
    options = PackedOptions(**{"kv_bytes": 8 << 20, "prefix_bytes": 8 << 20, "native": native} | options)
    engine = PackedEngine(model, template.table, frozenset({SIZES["tiny"].vocab - 12}), options)
    await engine.start(album)
    try:
        yield engine, [builder.build(messages(turns, album)) for turns in CONVERSATIONS]
    finally:
        await engine.close()


def messages(turns, album):
    return [
        Message(role, tuple(album.references[part] if isinstance(part, int) else part for part in parts))
        for role, parts in turns
    ]


def with_images(turns):
    return [(role, [IMAGES[part] if isinstance(part, int) else part for part in parts]) for role, parts in turns]


SPREAD = Home(tuple(standin.device(index) for index in range(3)), (range(1), range(1, 3), range(3, 4)))


@pytest.mark.parametrize(
    "how",
    [{}, {"step_tokens": 7, "burst_tokens": 7}, {"native": False}, {"home": SPREAD, "step_tokens": 24}],
    ids=["all at once", "chunks", "torch", "three devices"],
)
async def test_packed_answers_are_the_unsplit_models(checkpoint, unsplit, how):
    """Of several conversations together: in steps that hold everything, and in prefills cut to a few tokens."""
    async with engine_over(checkpoint, **how) as (engine, prompts):
        made = await asyncio.gather(*(ask(engine, generation(prompt, 10)) for prompt in prompts))
    unsplit.processor.size = {"shortest_edge": 3136, "longest_edge": MAX_PIXELS}
    assert unsplit.tokenizer.convert_tokens_to_ids("<|im_end|>") == SIZES["tiny"].vocab - 12
    for turns, prompt, (told,) in zip(map(with_images, CONVERSATIONS), prompts, made, strict=True):
        assert list(prompt.token_ids) == unsplit.inputs(turns)["input_ids"][0].tolist()
        assert told.tokens == unsplit.answer_ids(turns, 10)
        for item, row in zip(told.logprobs, unsplit.told(turns, told.tokens), strict=True):
            found = torch.tensor([logprob for _, logprob in sorted(item.top)])
            torch.testing.assert_close(found, row[[token for token, _ in sorted(item.top)]], atol=2e-4, rtol=0)


async def test_every_level_of_the_deepstack_is_seen(checkpoint):
    """Without one of them, another distribution."""
    async with engine_over(checkpoint) as (engine, prompts):
        ((right,),) = [await ask(engine, generation(prompts[1], 1))]
    for level in range(1, 4):
        async with engine_over(checkpoint) as (engine, prompts):
            for rows in engine._loader.rows.values():
                rows[level] = 0
            ((told,),) = [await ask(engine, generation(prompts[1], 1))]
        assert distance(told, right) > 1e-3


async def test_int8_layers_are_near_the_exact_ones(checkpoint):
    async with engine_over(checkpoint) as (engine, prompts):
        right = [(await ask(engine, generation(prompt, 1)))[0] for prompt in prompts]
    async with engine_over(checkpoint, quantization="int8") as (engine, prompts):
        for prompt, exact in zip(prompts, right, strict=True):
            assert 1e-4 < distance((await ask(engine, generation(prompt, 1)))[0], exact) < 0.3


def distance(told, other):
    """Mean difference of the first token's log-probabilities."""
    one, two = (dict(answer.logprobs[0].top) for answer in (told, other))
    return sum(abs(one[token] - two[token]) for token in one) / len(one)


async def test_batches_change_no_bit(checkpoint):
    """Where the engine's products are its own kernels', the norm of queries and keys keeps rows apart, too."""
    async with engine_over(checkpoint) as (engine, _):
        assert engine.describe().batch_invariant


def test_positions_are_those_of_transformers(unsplit):
    turns = [("user", [IMAGES[0], "First,", IMAGES[1], IMAGES[2], "then?"])]
    unsplit.processor.size = {"shortest_edge": 3136, "longest_edge": MAX_PIXELS}
    inputs = unsplit.inputs(turns)
    model, ids = unsplit.model.model, inputs["input_ids"][0]
    expected, _ = model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"]
    )
    images, at = [], 0
    for grid in inputs["image_grid_thw"].tolist():
        start = at + (ids[at:] == model.config.image_token_id).nonzero()[0].item()
        images.append((start, tuple(grid)))
        at = start + FAMILY.tokens_per_grid(model.config.to_dict(), tuple(grid))
    positions, following = FAMILY.positions(model.config.to_dict(), len(ids), images)
    assert positions.tolist() == expected[:, 0].tolist() and following == expected.max() + 1


# The services


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    folder = tmp_path_factory.mktemp("system")
    model = make_random_checkpoint(folder / "model", max_pixels=MAX_PIXELS, tied=False)
    done = invoke("split", model, folder / "halves")
    assert done.returncode == 0, done.stderr
    return folder / "halves", Unsplit(model, system=None)


@pytest.fixture(scope="module")
def pair(halves, tmp_path_factory):
    """Services on both halves, and the unsplit model."""
    with System(halves[0], tmp_path_factory.mktemp("store")) as system:
        yield system, halves[1]


def canonical(data):
    """The image the model is to see."""
    return Decoder(ImageLimits()).decode(data)


def test_images_of_every_kind_are_answered_about_after_one_encode(pair):
    system, unsplit = pair
    before, files = system.encodes(), odd_files()
    for name, data in files.items():
        image = system.upload(data)["id"]
        answers = system.ask(image, [QUESTION, "How many are there?"], max_tokens=8, temperature=0)
        for told, question in zip(answers, [QUESTION, "How many are there?"], strict=True):
            assert told["text"] == unsplit.answer([("user", [canonical(data), question])], 8), name
    assert system.encodes() - before == len(files)


def test_ten_questions_are_one_encode_and_scores_are_the_unsplit_models(pair):
    system, unsplit = pair
    file = save(photograph("coffee", (150, 250)), "PNG")
    before, image = system.encodes(), system.upload(file)["id"]
    questions = [f"Is this number {number}?" for number in range(8)]
    asked = [*questions, *({"text": text, "choices": CHOICES} for text in (QUESTION, "Well?"))]
    *written, first, second = system.ask(image, asked, max_tokens=6, temperature=0)
    for told, question in zip(written, questions, strict=True):
        assert told["text"] == unsplit.answer([("user", [canonical(file), question])], 6)
    for told, question in zip((first, second), (QUESTION, "Well?"), strict=True):
        expected = unsplit.weighed([("user", [canonical(file), question])], CHOICES)
        assert told["choices"] == pytest.approx(expected, abs=1e-4)
    (again,) = system.ask(image, ["And why?"], max_tokens=4, temperature=0)
    assert again["receipt"]["prefix"] == "hit" and system.encodes() == before + 1


def test_several_images_over_several_turns(pair):
    system, unsplit = pair
    files = [save(photograph(name, size), "PNG") for name, size in (("coffee", (90, 120)), ("chelsea", (200, 260)))]
    files.append(odd_files()["29x31"])
    images, parts = [canonical(data) for data in files], [image_part(data_url(data)) for data in files]
    messages = [
        {"role": "user", "content": [parts[0], text_part("What is in the first?"), parts[1]]},
        {"role": "assistant", "content": "A cup."},
        {"role": "user", "content": [text_part("And here?"), parts[2]]},
    ]
    turns = [
        ("user", [images[0], "What is in the first?", images[1]]),
        ("assistant", ["A cup."]),
        ("user", ["And here?", images[2]]),
    ]
    for _ in range(2):  # the second time from every cache
        reply = system.chat(messages, max_tokens=12, logprobs=True, top_logprobs=20)
        answer_ids = unsplit.answer_ids(turns, 12)
        assert reply["choices"][0]["message"]["content"] == unsplit.answer(turns, 12)
        told = reply["choices"][0]["logprobs"]["content"]
        assert len(told) == len(answer_ids) > 3
        for item, row in zip(told, unsplit.told(turns, answer_ids), strict=True):
            found = [one["logprob"] for one in item["top_logprobs"]]
            assert found == pytest.approx(row.topk(20).values.tolist(), abs=2e-4)


@pytest.mark.slow
def test_after_a_restart_the_store_has_all_of_an_embedding(pair):
    system, unsplit = pair
    file = save(photograph("chelsea", (250, 170)), "PNG")
    image = system.upload(file)
    for service in (*system.visions, *system.languages):
        service.terminate()
        service.restart()
    system.wait_whole()
    (told,) = system.ask(image["id"], [QUESTION], max_tokens=8, temperature=0)
    assert told["text"] == unsplit.answer([("user", [canonical(file), QUESTION])], 8)
    receipt = told["receipt"]
    assert (receipt["embedding"], receipt["prefix"], system.encodes()) == ("hit", "miss", 0)


# Records


def stored(path, image):
    """Reference and record of an image as the vision service makes them."""
    album, opened = Album(path, [image]), open_checkpoint(str(path))
    (made,) = album.references
    digest, fingerprint = image_digest(encoded(image)), opened.encoder_spec("float32").fingerprint()
    key = embedding_key(digest, fingerprint, opened.min_pixels, opened.max_pixels)
    reference = replace(made, key=key, image_digest=digest, fingerprint=fingerprint)
    fields = {name: getattr(reference, name) for name in ("key", "fingerprint", "image_digest", "grid_thw")}
    fields |= {"width": made.width, "height": made.height, "tokens": made.tokens}
    return reference, EmbeddingRecord(**fields, tensors=views_of(album.rows[made.key], opened.embedding_tensors))


@pytest.mark.parametrize(
    "changes",
    [
        {"deepstack.2": lambda tokens: None},
        pytest.param({"deepstack.3": lambda tokens: torch.zeros(tokens, 64)}, marks=pytest.mark.slow),
        {"deepstack.1": lambda tokens: torch.zeros(tokens, 32)},
        pytest.param({"deepstack.0": lambda tokens: torch.full((tokens, 64), torch.inf)}, marks=pytest.mark.slow),
    ],
    ids=["missing", "surplus", "narrower", "not finite"],
)
async def test_a_record_that_is_not_all_of_the_deepstack_is_refused(halves, tmp_path, changes):
    path, url = halves[1].path, f"file://{tmp_path}/store"
    reference, record = stored(path, IMAGES[0])
    store, good = open_store(url), record.serialize()
    tensors = dict(record.tensors)
    for name, make in changes.items():
        tensor = make(record.tokens)
        tensors = {other: view for other, view in tensors.items() if other != name}
        tensors |= {} if tensor is None else {name: view_of(tensor)}
    await store.put(reference.key, replace(record, tensors=tensors).serialize())
    async with running(path, tmp_path, store=url) as client:
        with pytest.raises(LookonceError) as caught:
            await answer(client, asking(user(reference, QUESTION)))
        assert caught.value.kind is ErrorKind.EMBEDDING_INVALID
        await store.put(reference.key, good)
        reply = await answer(client, asking(user(reference, QUESTION)))
    await store.close()
    assert reply.text == halves[1].answer([("user", [IMAGES[0], QUESTION])], 8)


async def test_a_stored_embedding_without_its_deepstack_is_made_again(halves, tmp_path):
    settings = VisionSettings(
        model=str(halves[1].path),
        listen=f"unix:{tmp_path}/vision.sock",
        store=f"file://{tmp_path}/store",
        device="cpu",
        dtype="float32",
        tensor_cache_bytes=0,
    )
    _, core = build(settings, load(settings))
    core.start()
    file, store = encoded(IMAGES[0]), core._store
    try:
        made = await core.encode(file)
        again = await core.encode(file)
        assert (made.outcome, again.outcome) == ("miss", "hit")
        assert set(again.record.tensors) == set(tensor_names(3))
        assert again.reference.record_bytes == len(made.record.serialize()) > 4 * 4 * 64 * made.reference.tokens
        (key, tensors) = made.reference.key, dict(made.record.tensors)
        del tensors["deepstack.1"]
        await store.put(key, replace(made.record, tensors=tensors).serialize())
        with pytest.raises(LookonceError) as caught:
            await core.fetch(key)
        assert caught.value.kind is ErrorKind.EMBEDDING_MISSING
        assert (await core.encode(file)).outcome == "miss"
        assert set((await core.encode(file)).record.tensors) == set(tensor_names(3))
        assert await core.forget([], [made.reference.image_digest]) == (1, True)
        assert not await store.contains(key)
    finally:
        await core.close()


# Settings


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_served_and_counted_as_transformers_builds_it(name):
    config, preprocessor = published(name), FAMILY.preprocessor(PREPROCESSOR)
    assert FAMILY.problems(config, preprocessor, Half) == []
    assert (preprocessor["min_pixels"], preprocessor["max_pixels"]) == (65536, 16777216)
    counted = size_of(FAMILY, config, preprocessor)
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig.from_dict(config))
    model.tie_weights()
    tower = sum(parameter.numel() for parameter in model.model.visual.parameters())
    assert counted.halves[Half.VISION].parameters == tower
    assert counted.halves[Half.LANGUAGE].parameters == model.num_parameters() - tower
    assert (counted.tied, counted.context, counted.stored) == (PUBLISHED[name][-1], 262144, "bfloat16")
    hidden = PUBLISHED[name][0]
    assert counted.image_tokens(1024, 1024) == 1024
    assert counted.embedding_bytes(1024, "bfloat16") == 1024 * hidden * 2 * 4 + RECORD_BYTES
    assert counted.kv_elements == 2 * PUBLISHED[name][3] * 8 * 128
    arch = SIZES[name.lower()]
    assert FAMILY.architecture(config) == arch and arch.mrope_section == [24, 20, 20]
    ids = {"<|endoftext|>": 0, "<|im_end|>": 1, "<|image_pad|>": 2, "<|video_pad|>": 3}
    ids |= {"<|vision_start|>": 4, "<|vision_end|>": 5}
    names = tensor_shapes(arch, tied=counted.tied)
    for layout in ("published", "nested"):
        made = arch.config(ids, layout=layout, tied=counted.tied, dtype="bfloat16")
        assert FAMILY.architecture(made) == arch and FAMILY.tied_head(made) == counted.tied
        assert FAMILY.problems(made, preprocessor, Half) == []
        assert tensor_shapes(arch, layout=layout, tied=counted.tied) == names
    own = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not (counted.tied and name == "lm_head.weight")
    }
    assert names == own and sum(map(math.prod, names.values())) == model.num_parameters()


def test_plan_and_doctor_know_its_figures(tmp_path):
    model = tmp_path / "8B"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(published("8B")))
    (model / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    done = invoke("plan", "--model", model, "--gpus", "24,80")
    assert done.returncode == 0, done.stderr
    halves = size_of(FAMILY, published("8B"), FAMILY.preprocessor(PREPROCESSOR)).halves
    assert sum(half.parameters for half in halves.values()) == 8_767_123_696
    for half in Half:
        assert f"{halves[half].parameters:,} parameters" in done.stdout
    assert "1024 tokens (1024x1024)" in done.stdout and "32.0 MiB" in done.stdout
    whole = make_random_checkpoint(tmp_path / "tiny")
    done = invoke("doctor", "--model", whole, "--data-dir", tmp_path, "--port", "0", "--json")
    found = {finding["check"]: finding for finding in json.loads(done.stdout)}
    assert found["checkpoint"]["status"] == "ok" and "whole, both halves" in found["checkpoint"]["detail"]


@pytest.mark.parametrize(
    ("vision", "text", "said"),
    [
        (
            {"hidden_act": "silu"},
            {},
            "hidden_act 'silu' is not supported (gelu_pytorch_tanh); use a checkpoint of Qwen3",
        ),
        ({"deepstack_visual_indexes": [0, 9]}, {}, "must be different numbers of blocks, below depth 4, got [0, 9]"),
        ({"deepstack_visual_indexes": [1, 1]}, {}, "must be different numbers of blocks, below depth 4, got [1, 1]"),
        ({"deepstack_visual_indexes": None}, {}, "must be different numbers of blocks, below depth 4, got None"),
        ({"depth": 40, "deepstack_visual_indexes": [*range(16)]}, {}, "may be at most 15, got 16"),
        ({"num_position_embeddings": 0}, {}, "num_position_embeddings must be a whole number above 0, got 0"),
        ({"out_hidden_size": 128}, {}, "vision_config.out_hidden_size 128 differs from the language model's 64"),
        ({}, {"attention_bias": True}, "attention_bias true is not supported"),
        ({}, {"head_dim": 33}, "head_dim 33 must be an even number"),
        ({}, {"head_dim": None}, "head_dim 0 must be an even number"),
        ({}, {"num_key_value_heads": 3}, "num_attention_heads 4 a multiple of num_key_value_heads 3"),
        ({}, {"rope_scaling": {"mrope_section": [8, 4, 5]}}, "mrope_section must be three whole numbers that add up"),
        (
            {},
            {"rope_scaling": {"mrope_section": [6, 5, 5], "mrope_interleaved": False}},
            "mrope_interleaved must be true",
        ),
        ({}, {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported (silu); use a checkpoint of Qwen3-VL"),
    ],
)
def test_what_cannot_be_computed_is_said_before_anything_is_loaded(tmp_path, vision, text, said):
    path = make_random_checkpoint(tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    for section, changes in (("vision_config", vision), ("text_config", text)):
        config[section] |= changes
    (path / "config.json").write_text(json.dumps(config))
    problems = check_checkpoint(str(path)).problems
    assert any(said in problem for problem in problems), problems


def test_another_deepstack_is_another_encoder(tmp_path):
    specs = []
    for number, blocks in enumerate([(0, 1, 2), (0, 1, 3)]):
        path = make_random_checkpoint(tmp_path / str(number), deepstack_blocks=blocks)
        specs.append(open_checkpoint(str(path)).encoder_spec("float32").vision_config)
    assert specs[0] != specs[1]


def test_dimensions_that_cannot_be(tmp_path):
    with pytest.raises(CheckpointError, match="heads 4 / kv_heads 3 don't divide"):
        make_random_checkpoint(tmp_path / "model", kv_heads=3)
