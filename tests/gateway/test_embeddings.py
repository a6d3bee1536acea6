"""/v1/embeddings, /v1/rerank and /v1/images/search through real services: an embedding model beside the one that writes
text, over one vision service and one store."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import httpx2
import numpy as np
import openai
import pytest

import lookonce
from tests.gateway.conftest import Services
from tests.gateway.processes import GatewayProcess
from tests.images import photograph, save
from tests.processes import ServiceProcess
from tests.retrievers import UnsplitColQwen2, UnsplitGme, chat_prompt, colqwen2
from vision_service.images import Decoder, ImageLimits

DEFAULT = "You are a helpful assistant."
KEYS = "one=key-of-tenant-number-one,two=key-of-tenant-number-two"
ONE, TWO = "key-of-tenant-number-one", "key-of-tenant-number-two"
FILES = [save(photograph(name, size), "PNG") for name, size in (("coffee", (150, 100)), ("chelsea", (90, 140)))]


@pytest.fixture(scope="module")
def models(checkpoint, embedding_model, tmp_path_factory) -> dict[str, Path]:
    return {"gme": embedding_model, "colqwen2": colqwen2(checkpoint, tmp_path_factory.mktemp("late") / "colqwen2")}


@pytest.fixture(scope="module")
def retrievers(services: Services, models, retriever) -> Iterator[dict[str, ServiceProcess]]:
    arguments = ("--store", services.store, "--vision", services.vision.address)
    with ServiceProcess("lm_service", "--model", str(models["colqwen2"]), *arguments) as tokens:
        yield {"gme": retriever, "colqwen2": tokens}


def gateway_of(services, retriever, *more):
    beside = ["--embed-lm", retriever.address, "--embed-model-name", "pictures"]
    return GatewayProcess(*services.arguments(), *beside, *more)


@pytest.fixture(scope="module")
def pooled(services, retrievers) -> Iterator[GatewayProcess]:
    with gateway_of(services, retrievers["gme"], "--api-keys", KEYS, "--secret", "s") as process:
        yield process


@pytest.fixture(scope="module")
def tokens(services, retrievers) -> Iterator[GatewayProcess]:
    with gateway_of(services, retrievers["colqwen2"]) as process:
        yield process


@pytest.fixture
def one(pooled) -> Iterator[httpx2.Client]:
    with pooled.client(ONE) as client:
        yield client


@pytest.fixture
def late(tokens) -> Iterator[httpx2.Client]:
    with tokens.client() as client:
        yield client


def ask(http, path, **body):
    reply = http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def refusal(http, path, **body):
    reply = http.post(path, json=body)
    assert reply.status_code == 400, reply.text
    return reply.json()["error"]


def upload(http, file):
    reply = http.post("/v1/images", files={"file": file})
    assert reply.status_code == 200, reply.text
    return reply.json()["id"]


def data_url(file):
    return "data:image/png;base64," + base64.b64encode(file).decode()


def shown(file):
    return Decoder(ImageLimits()).decode(file)


def test_openais_client_gets_the_unsplit_models_vectors(pooled, models):
    unsplit = UnsplitGme(models["gme"])
    with openai.OpenAI(base_url=f"{pooled.url}/v1", api_key=ONE, max_retries=0) as client:
        reply = client.embeddings.create(model="pictures", input=["a cup of coffee", "snow"])
        floats = client.embeddings.create(model="pictures", input="snow", encoding_format="float")
        short = client.embeddings.create(model="pictures", input="snow", dimensions=16)
    for item, text in zip(reply.data, ["a cup of coffee", "snow"], strict=True):
        assert np.abs(np.array(item.embedding) - unsplit.vector(chat_prompt(DEFAULT, text)).numpy()).max() < 2e-4
    assert floats.data[0].embedding == pytest.approx(reply.data[1].embedding, abs=1e-6)
    assert reply.usage.prompt_tokens == reply.usage.total_tokens > 0 and reply.model == "pictures"
    cut = np.array(reply.data[1].embedding)[:16]
    assert np.abs(np.array(short.data[0].embedding) - cut / np.linalg.norm(cut)).max() < 1e-5


def test_all_forms_of_an_image_are_one_vector(one, models):
    unsplit, image = UnsplitGme(models["gme"]), upload(one, FILES[0])
    part = {"type": "image_url", "image_url": {"url": data_url(FILES[0])}}
    inputs = [
        {"image": image},
        {"image": f"lookonce:{image}"},
        {"image": data_url(FILES[0])},
        {"image": base64.b64encode(FILES[0]).decode()},
        part,
        [part],
        {"content": [part]},
        [part, {"type": "text", "text": "of whom?"}],
        {"text": "of whom?", "image": image},
    ]
    reply = ask(one, "/v1/embeddings", input=inputs)
    found = np.array([item["embedding"] for item in reply["data"]])
    alone = unsplit.vector(chat_prompt(DEFAULT, shown(FILES[0]))).numpy()
    both = unsplit.vector(chat_prompt(DEFAULT, shown(FILES[0]), "of whom?")).numpy()
    assert np.abs(found[:7] - alone).max() < 2e-4 and np.abs(found[7:] - both).max() < 2e-4
    system = {"role": "system", "content": "Find it."}
    messages = [system, {"role": "user", "content": [part, {"type": "text", "text": "of whom?"}]}]
    (said,) = ask(one, "/v1/embeddings", messages=messages)["data"]
    told = unsplit.vector(chat_prompt("Find it.", shown(FILES[0]), "of whom?")).numpy()
    assert np.abs(np.array(said["embedding"]) - told).max() < 2e-4
    assert ask(one, "/v1/embeddings", input={"image": image})["usage"]["prompt_tokens_details"]["image_tokens"] > 0


def test_one_encode_serves_both_models(services, one):
    file = save(photograph("rocket", (140, 84)), "PNG")
    before = services.encodes()
    image = upload(one, file)
    ask(one, f"/v1/images/{image}/questions", questions=["What is it?"], max_tokens=2)
    ask(one, "/v1/embeddings", input={"image": image})
    assert services.encodes() == before + 1


def test_token_vectors_and_their_maxsim_are_transformers_own(late, models):
    unsplit = UnsplitColQwen2(models["colqwen2"])
    text = "a cup of coffee"
    query, images = unsplit.queries([text])[0], [unsplit.image(shown(file)) for file in FILES]
    reply = ask(late, "/v1/embeddings", input=[text, {"image": data_url(FILES[0])}])
    for item, expected in zip(reply["data"], [query, images[0]], strict=True):
        assert item["shape"] == list(expected.shape)
        assert np.abs(np.array(item["embedding"]) - expected.numpy()).max() < 2e-4
    (packed,) = ask(late, "/v1/embeddings", input=text, encoding_format="base64")["data"]
    rows = np.frombuffer(base64.b64decode(packed["embedding"]), "<f4").reshape(packed["shape"])
    assert np.abs(rows - query.numpy()).max() < 2e-4
    documents = [{"image": data_url(file)} for file in FILES]
    ranked = ask(late, "/v1/rerank", query=text, documents=documents)
    scores = {item["index"]: item["relevance_score"] for item in ranked["results"]}
    expected = unsplit.processor.score_retrieval([query], images)[0].tolist()
    assert [scores[0], scores[1]] == pytest.approx(expected, abs=2e-4 * len(query))
    assert [item["index"] for item in ranked["results"]] == sorted((0, 1), key=lambda place: -expected[place])


def test_documents_are_ranked_by_their_cosine(one, models):
    unsplit, image = UnsplitGme(models["gme"]), upload(one, FILES[1])
    documents = ["a cat", {"image": image}, {"text": "a cat", "image": image}]
    body = {"query": "animals", "documents": documents, "instruction": "Find it."}
    reply = ask(one, "/v1/rerank", model="pictures", top_n=2, **body)
    query = unsplit.vector(chat_prompt("Find it.", "animals"))
    parts = [["a cat"], [shown(FILES[1])], [shown(FILES[1]), "a cat"]]
    expected = [float(query @ unsplit.vector(chat_prompt(DEFAULT, *one))) for one in parts]
    best = sorted(range(3), key=lambda place: -expected[place])[:2]
    assert [item["index"] for item in reply["results"]] == best
    assert [item["relevance_score"] for item in reply["results"]] == pytest.approx(
        [expected[n] for n in best], abs=5e-4
    )
    whole = {item["index"]: item["document"] for item in ask(one, "/v1/rerank", **body)["results"]}
    assert whole == {0: {"text": "a cat"}, 1: {"image": image}, 2: {"image": image, "text": "a cat"}}
    bare = ask(one, "/v1/rerank", return_documents=False, **body)
    assert not any("document" in item for item in bare["results"])


def test_a_second_search_over_thirty_images_encodes_and_prefills_nothing_of_them(services, pooled, retrievers, models):
    files = [save(photograph("astronaut", (56 + 4 * number, 84)), "PNG") for number in range(30)]
    with pooled.client(TWO) as http:
        images = [upload(http, file) for file in files]
        before = services.encodes()
        first = ask(http, "/v1/images/search", query={"image": images[7]}, top_n=3)
        assert first["data"][0]["id"] == images[7] and first["data"][0]["score"] == pytest.approx(1, abs=1e-5)
        assert first["searched"] == 30 and first["skipped"] == [] and not first["has_more"]
        assert first["receipt"]["prefill_tokens"] > 30 * 6 and services.encodes() == before
        second = ask(http, "/v1/images/search", query={"image": images[7]}, top_n=3)
        assert second["data"] == first["data"]
        assert second["receipt"] == {"encoded": 0, "prefill_tokens": 0, "kept": 31}
        text = ask(http, "/v1/images/search", query="an astronaut", top_n=30)
        assert text["receipt"]["kept"] == 30 and text["receipt"]["prefill_tokens"] == text["usage"]["prompt_tokens"]
        unsplit = UnsplitGme(models["gme"])
        query = unsplit.vector(chat_prompt(DEFAULT, "an astronaut"))
        for item in text["data"][:3]:
            vector = unsplit.vector(chat_prompt(DEFAULT, shown(files[images.index(item["id"])])))
            assert item["score"] == pytest.approx(float(query @ vector), abs=5e-4)
        pages, last = [], None
        while True:
            page = ask(http, "/v1/images/search", query="an astronaut", top_n=30, limit=12, after=last)
            pages += [item["id"] for item in page["data"]]
            last = page["last_id"]
            if not page["has_more"]:
                break
        assert sorted(pages) == sorted(images)
        assert services.encodes() == before

        gone = http.delete(f"/v1/images/{images[7]}").json()
        assert gone["complete"]
        after = ask(http, "/v1/images/search", query={"image": images[8]}, top_n=30)
        assert images[7] not in [item["id"] for item in after["data"]] and after["searched"] == 29
        again = upload(http, files[7])
        assert again == images[7]
        found = ask(http, "/v1/images/search", query="an astronaut", top_n=30)
        assert found["receipt"]["kept"] == 30  # the query's and 29 images'; the erased one's is made anew
        assert found["receipt"]["prefill_tokens"] > 6
        same = ask(http, "/v1/images/search", query="an astronaut", top_n=30)
        assert same["receipt"] == {"encoded": 0, "prefill_tokens": 0, "kept": 31} and same["data"] == found["data"]
    with pooled.client(ONE) as other:
        found = ask(other, "/v1/images/search", query="an astronaut", top_n=100)
        assert not {item["id"] for item in found["data"]} & set(images)
        assert other.post("/v1/embeddings", json={"input": {"image": images[0]}}).status_code == 404


def test_what_is_no_request_for_vectors_is_told_by_field(one, late):
    assert refusal(one, "/v1/embeddings", input=[1, 2, 3])["message"].startswith("a list of token ids is not supported")
    assert refusal(one, "/v1/embeddings", input=[])["param"] == "input"
    assert refusal(one, "/v1/embeddings", input=[{"image": "img_nothing"}, {}])["param"] == "input.1"
    assert refusal(one, "/v1/embeddings")["message"].endswith("give one of 'input' and 'messages'")
    assert refusal(one, "/v1/embeddings", input="a", dimensions=65)["param"] == "dimensions"
    assert refusal(late, "/v1/embeddings", input="a", dimensions=16)["param"] == "dimensions"
    assert "one image" in refusal(late, "/v1/embeddings", input={"text": "a", "image": data_url(FILES[0])})["message"]
    assert refusal(late, "/v1/rerank", query="a", documents=["b"], instruction="Look.")["param"] == "instruction"
    assert refusal(one, "/v1/images/search", query="a", limit=100_000)["param"] == "limit"


def test_requests_go_where_their_model_is(one, http):
    names = [model["id"] for model in one.get("/v1/models").json()["data"]]
    assert names == ["tiny-vl", "pictures"]
    assert one.get("/v1/models/pictures").json()["vectors"] == {"width": 64, "of_tokens": False}
    wrong = refusal(one, "/v1/embeddings", model="tiny-vl", input="a")
    assert "'tiny-vl' writes text and makes no vectors: ask 'pictures'" in wrong["message"]
    assert one.post("/v1/embeddings", json={"model": "other", "input": "a"}).status_code == 404
    chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
    assert one.post("/v1/chat/completions", json=chat | {"model": "tiny-vl"}).status_code == 200
    assert one.post("/v1/chat/completions", json=chat | {"model": "pictures"}).status_code == 404
    for path, body in (("embeddings", {"input": "a"}), ("rerank", {"query": "a", "documents": ["b"]})):
        alone = refusal(http, f"/v1/{path}", **body)
        assert "--embed-lm" in alone["message"] and "GME" in alone["message"]


def test_a_gateway_over_an_embedding_model_alone(services, retrievers):
    address = retrievers["gme"].address
    with GatewayProcess("--vision", services.vision.address, "--lm", address) as process, process.client() as http:
        assert len(ask(http, "/v1/embeddings", input="a")["data"][0]["embedding"]) == 64
        chat = refusal(http, "/v1/chat/completions", messages=[{"role": "user", "content": "Hello"}])
        assert "writes no text" in chat["message"]


async def test_lookonces_own_clients(pooled, tokens):
    with lookonce.Client(pooled.url, ONE) as client:
        image = client.image(FILES[0])
        vectors = client.embed([image, "coffee", [image, "coffee"]], model="pictures")
        assert [len(vector) for vector in vectors] == [64, 64, 64]
        ranked = client.rerank("coffee", [image, "tea"], instruction="Find it.", top_n=1)
        assert len(ranked) == 1 and -1 <= ranked[0].score <= 1
        cosine = sum(a * b for a, b in zip(vectors[0], vectors[1], strict=True))
        found = client.search("coffee", top_n=100)
        assert next(item.score for item in found.found if item.id == image.id) == pytest.approx(cosine, abs=1e-5)
        assert len(client.embed(["a"], dimensions=8)[0]) == 8
        with pytest.raises(lookonce.LookonceError, match="a list of at least one"):
            client.embed([])
        async with lookonce.AsyncClient(pooled.url, ONE) as twin:
            assert await twin.embed([await twin.image(FILES[0]), "coffee"]) == vectors[:2]
            assert await twin.rerank("coffee", ["tea"]) and (await twin.search(image, top_n=1)).found[0].id == image.id
    with lookonce.Client(tokens.url) as client:
        (rows,) = client.embed(["coffee"], input_type="document")
        assert len(rows) >= 1 and {len(row) for row in rows} == {128}


def test_an_embedding_model_among_the_variants(services, retrievers, one):
    line = f"vision={services.vision.address} lm="
    variants = (
        f"a weight=1 {line}{services.language.address}; pictures weight=1 task=embed {line}{retrievers['gme'].address}"
    )
    with GatewayProcess("--variants", variants) as process, process.client() as http:
        image = upload(http, FILES[0])
        answers = ask(http, f"/v1/images/{image}/questions", questions=["What?"] * 3, max_tokens=1)["answers"]
        assert {answer["receipt"]["variant"] for answer in answers} == {"a"}
        (vector,) = ask(http, "/v1/embeddings", input={"image": image})["data"]
    (same,) = ask(one, "/v1/embeddings", input={"image": data_url(FILES[0])})["data"]
    assert vector["embedding"] == pytest.approx(same["embedding"], abs=1e-5)
