"""Embedding models over a Qwen-VL tower, held to transformers' classes in float32: GME's layout pooled by hand, and
ColQwen2ForRetrieval."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from lookonce.core.errors import CheckpointError, ErrorKind, LookonceError
from lookonce.models.checkpoint import Half, open_checkpoint
from lookonce.models.checkpoint.check import check_checkpoint
from lookonce.models.checkpoint.split import split_checkpoint
from lookonce.models.qwen2_5_vl.architecture import SIZES as SIZES_2_5
from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from protos.lookonce.v1 import language_pb2, vision_pb2
from tests.families.models_page import No, Served
from tests.images import photograph, save
from tests.lm import split
from tests.retrievers import UnsplitColQwen2, UnsplitGme, chat_prompt, colpali_engine, colqwen2, gme
from tests.system.test_shared_towers import vision_of
from vision_service.images import Decoder, ImageLimits

DEFAULT = "You are a helpful assistant."
FILES = [save(photograph(name, size), "PNG") for name, size in (("coffee", (150, 100)), ("chelsea", (90, 140)))]
TEXTS = ["a cup of coffee", "What does the sign say? <|im_end|>", "snow"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("retrieval")
    base = make_random_checkpoint(folder / "base", layout="nested", max_pixels=100 * 28 * 28)
    newer = make_random_checkpoint(folder / "newer", sizes=SIZES_2_5, layout="nested", max_pixels=100 * 28 * 28)
    found = {
        "base": base,
        "gme": gme(base, folder / "gme"),
        "mean": gme(base, folder / "mean", "mean_tokens"),
        "gme 2.5": gme(newer, folder / "gme-2.5", "lasttoken"),
        "colqwen2": colqwen2(base, folder / "colqwen2"),
        "colqwen2.5": colqwen2(newer, folder / "colqwen2.5"),
    }
    return found | {"colpali-engine": colpali_engine(base, folder / "colpali", found["colqwen2"])}


def image(file):
    return Decoder(ImageLimits()).decode(file)


def item(*parts, **fields):
    wire = [
        language_pb2.Part(text=part) if isinstance(part, str) else language_pb2.Part(image=part.to_proto())
        for part in parts
    ]
    return language_pb2.EmbedItem(parts=wire, **fields)


async def embed(client, *items):
    """Vectors of each item, in one call."""
    reply = await client.embed(language_pb2.EmbedRequest(items=items))
    return [vectors_of(result) for result in reply.results]


def vectors_of(result):
    assert result.WhichOneof("outcome") == "vectors", result.error
    return np.frombuffer(result.vectors.data, "<f4").reshape(result.vectors.rows, result.vectors.width)


async def references(model, store):
    async with vision_of(model, store) as vision:
        return [(await vision.encode(vision_pb2.EncodeRequest(image=file))).reference for file in FILES]


@pytest.mark.parametrize(("name", "pooling"), [("gme", "last"), ("mean", "mean"), ("gme 2.5", "last")])
async def test_pooled_vectors_are_the_unsplit_models(models, tmp_path, name, pooling):
    store, unsplit = f"file://{tmp_path}/store", UnsplitGme(models[name])
    one, two = await references(models[name], store)
    inputs = [(TEXTS[0],), (one,), (two, TEXTS[2]), (one, "and", two)]
    shown = {id(one): image(FILES[0]), id(two): image(FILES[1])}
    async with split.running(models[name], tmp_path, store=store) as client:
        found = await embed(client, *(item(*parts) for parts in inputs))
        asked = await embed(client, item(TEXTS[0], instruction="Find an image that matches the given text."))
        alone = [(await embed(client, item(*parts)))[0] for parts in inputs]
    for vectors, parts in zip(found, inputs, strict=True):
        expected = unsplit.vector(chat_prompt(DEFAULT, *(shown.get(id(part), part) for part in parts)), pooling=pooling)
        assert vectors.shape == (1, 64)
        assert np.abs(vectors[0] - expected.numpy()).max() < 2e-4
    turns = chat_prompt("Find an image that matches the given text.", TEXTS[0])
    assert np.abs(asked[0][0] - unsplit.vector(turns, pooling=pooling).numpy()).max() < 2e-4
    for together, single in zip(found, alone, strict=True):
        assert np.abs(together - single).max() < 1e-4


@pytest.mark.parametrize("name", ["colqwen2", "colqwen2.5"])
async def test_token_vectors_are_transformers_own(models, tmp_path, name):
    store, unsplit = f"file://{tmp_path}/store", UnsplitColQwen2(models[name])
    shown = await references(models[name], store)
    texts = [TEXTS[0], TEXTS[2]]
    async with split.running(models[name], tmp_path, store=store) as client:
        items = [*(item(text, query=True) for text in texts), *(item(one) for one in shown)]
        found = await embed(client, *items)
        alone = [(await embed(client, one))[0] for one in items]
        described = (await client.describe()).vectors
    expected = [unsplit.queries([text])[0] for text in texts] + [unsplit.image(image(file)) for file in FILES]
    assert described.of_tokens and described.width == 128
    for vectors, own, single in zip(found, expected, alone, strict=True):
        assert vectors.shape == tuple(own.shape)
        assert np.abs(vectors - own.numpy()).max() < 2e-4
        assert np.abs(vectors - single).max() < 1e-4
        assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-5


async def test_colpali_engines_layout_is_read_and_has_the_positions_of_the_model_within(models, tmp_path):
    """A text's positions are the same in both; an image's are not."""
    store = f"file://{tmp_path}/store"
    shown, found = await references(models["base"], store), {}
    for name in ("colqwen2", "colpali-engine"):
        async with split.running(models[name], tmp_path, store=store) as client:
            found[name] = await embed(client, item(TEXTS[0], query=True), item(shown[0]))
    (query, picture), (same, other) = found.values()
    assert np.abs(query - same).max() < 1e-6
    assert picture.shape == other.shape and np.abs(picture - other).max() > 1e-3


async def test_a_texts_special_tokens_are_text(models, tmp_path):
    """Of pooled prompts and of token vectors: no token of the prompt's structure comes from an input."""
    for name in ("gme", "colqwen2"):
        async with split.running(models[name], tmp_path) as client:
            reply = await client.embed(language_pb2.EmbedRequest(items=[item("a<|im_end|>b"), item("ab")]))
            spelt, plain = (result.vectors.usage.prompt_tokens for result in reply.results)
            assert spelt > plain + 5


async def test_a_retrieval_model_writes_no_text(models, tmp_path):
    async with split.running(models["colqwen2"], tmp_path) as client:
        with pytest.raises(LookonceError) as caught:
            await split.answer(client, split.asking(split.user("Hello")))
        assert caught.value.kind is ErrorKind.UNSUPPORTED and "/v1/embeddings" in caught.value.message
        with pytest.raises(LookonceError) as caught:
            await client.score(
                language_pb2.ScoreRequest(
                    items=[language_pb2.ScoreItem(messages=[split.user("Is it?")], choices=["yes", "no"])]
                )
            )
        assert caught.value.kind is ErrorKind.UNSUPPORTED
    with pytest.raises(CheckpointError, match="writes no text"):
        split.load(split.LanguageSettings(model=str(models["colqwen2"]), task="generate", device="cpu"))


async def test_a_model_that_writes_text_makes_no_vectors_unless_told_to(models, tmp_path):
    async with split.running(models["base"], tmp_path) as client:
        assert not (await client.describe()).HasField("vectors")
        with pytest.raises(LookonceError, match="--task embed") as caught:
            await embed(client, item("a"))
        assert caught.value.kind is ErrorKind.UNSUPPORTED
    found = []
    for name, task in (("base", "embed"), ("gme", "auto")):
        async with split.running(models[name], tmp_path, task=task) as client:
            found += await embed(client, item("a"))
    assert np.array_equal(*found)


async def test_what_is_wrong_with_one_item_is_told_of_that_item(models, tmp_path):
    store = f"file://{tmp_path}/store"
    one, two = await references(models["base"], store)
    async with split.running(models["colqwen2"], tmp_path, store=store) as client:
        lost = one.to_proto()
        lost.key = bytes(32)
        items = [
            item("fine"),
            item("a", one),
            item("b", instruction="Look."),
            item(),
            language_pb2.EmbedItem(parts=[language_pb2.Part(image=lost)]),
            item(two),
        ]
        reply = await client.embed(language_pb2.EmbedRequest(items=items))
    kinds = [result.WhichOneof("outcome") for result in reply.results]
    assert kinds == ["vectors", "error", "error", "error", "error", "vectors"]
    messages = [result.error.message for result in reply.results]
    assert "not of both together" in messages[1] and "no instruction" in messages[2] and "no store" in messages[4]


@pytest.mark.parametrize("name", ["gme", "colqwen2"])
def test_its_fingerprint_is_that_of_the_model_within(models, name):
    specs = [open_checkpoint(str(models[each])).encoder_spec("float32") for each in ("base", name)]
    assert specs[0].fingerprint() == specs[1].fingerprint()


async def test_split_halves_make_the_same_vectors(models, tmp_path):
    """All that says how vectors are made goes with the language half."""
    for name in ("mean", "colqwen2"):
        halves = split_checkpoint(str(models[name]), tmp_path / name).paths
        found = []
        for path in (models[name], halves[Half.LANGUAGE]):
            async with split.running(path, tmp_path) as client:
                found += await embed(client, item("a cup", query=True))
        assert np.array_equal(*found)


def test_a_half_that_computes_other_vectors_is_not_served(models, monkeypatch):
    monkeypatch.setattr("lm_service.engine.vectors.self_check.vectors_of", lambda *_: [np.full((2, 64), 0.125)] * 2)
    settings = split.LanguageSettings(model=str(models["gme"]), device="cpu", dtype="bfloat16")
    with pytest.raises(CheckpointError, match="vectors of two prompts about one image differ"):
        split.load(settings)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"modules.json": [{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]}, "a Dense module"),
        ({"1_Pooling/config.json": {"pooling_mode_cls_token": True}}, "the pooling cls_token is not computed"),
        ({"config.json": {"matryoshka_dimensions": "all"}}, "matryoshka_dimensions must be a list of widths"),
    ],
)
def test_what_makes_no_vectors_is_said_in_one_sentence(models, tmp_path, files, said):
    path = shutil.copytree(models["mean"], tmp_path / "spoiled")
    for name, content in files.items():
        own = json.loads((path / name).read_text()) if name == "config.json" else {}
        (path / name).write_text(json.dumps(own | content if isinstance(content, dict) else content))
    (problem,) = check_checkpoint(str(path)).problems
    assert said in problem


async def test_int8_vectors_are_nearly_the_same(models, tmp_path):
    found = []
    for quantization in ("none", "int8"):
        async with split.running(models["colqwen2"], tmp_path, quantization=quantization) as client:
            found += await embed(client, item(TEXTS[0], query=True))
    assert (found[0] * found[1]).sum(axis=1).min() > 0.98


SERVED = [
    Served(
        f"{models} (vectors)",
        f"colqwen2/{within}",
        split="test_token_vectors_are_transformers_own",
        packed="test_token_vectors_are_transformers_own",
        prefix=No("test_a_retrieval_model_writes_no_text"),
        scores=No("test_a_retrieval_model_writes_no_text"),
        video=No("families/test_models_page.py::test_video_is_no_part_of_a_chat"),
        quantised="test_int8_vectors_are_nearly_the_same",
    )
    for models, within in (("ColQwen2", "qwen2_vl"), ("ColQwen2.5", "qwen2_5_vl"))
]
