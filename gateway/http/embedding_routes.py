"""/v1/embeddings, /v1/rerank and /v1/images/search: vectors of texts and images, and which are like which."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from gateway.conversation import Caller, ImagePart
from gateway.core import Gateway
from gateway.http.image_routes import image_object
from gateway.http.request_images import asked_bounds, check_images, keep_all
from gateway.http.route import Route, caller_of, gateway_of, json_response, until_disconnect
from gateway.images.image_records import ImageRecord
from gateway.images.index import is_alias
from gateway.images.library import ID_PREFIX
from gateway.images.vector_cache import Vector
from gateway.routing.variants import ModelCard, no_such_model
from gateway.schemas.embeddings import (
    EmbeddingList,
    EmbeddingsRequest,
    FoundImages,
    RerankRequest,
    RerankResult,
    SearchRequest,
    TextAndImage,
    VectorFields,
)
from gateway.schemas.requests import REFERENCE, ImageUrlPart, TextPart
from gateway.vectors import Compared, Made, VectorInput, cut
from lookonce.core.errors import ErrorKind, LookonceError, invalid
from protos.lookonce.v1 import language_pb2

router = APIRouter(tags=["embeddings"], route_class=Route)
T = TypeVar("T")


@router.post("/v1/embeddings", summary="Make vectors of texts and images", response_model=EmbeddingList)
async def create_embeddings(request: Request, body: EmbeddingsRequest) -> Response:
    """A vector of each input, of length 1; of models such as ColQwen2 a vector of each of its tokens."""
    gateway, caller = gateway_of(request), caller_of(request, body.user)
    return json_response(await until_disconnect(request, embeddings(body, gateway, caller)))


@router.post("/v1/rerank", summary="Order documents by a query", response_model=RerankResult)
async def rerank(request: Request, body: RerankRequest) -> Response:
    """Texts and images by how they compare with a query: the cosine of their vectors, or MaxSim of token vectors."""
    gateway, caller = gateway_of(request), caller_of(request, body.user)
    return json_response(await until_disconnect(request, ranked(body, gateway, caller)))


@router.post("/v1/images/search", summary="Find images", response_model=FoundImages)
async def search_images(request: Request, body: SearchRequest) -> Response:
    """The kept images that are most like a text, an image, or both, best first. Newest ones are looked at, `limit` of
    them; older ones `after` the `last_id`. What was made of an image is kept with it: a second search makes nothing."""
    gateway, caller = gateway_of(request), caller_of(request, body.user)
    return json_response(await until_disconnect(request, found_images(body, gateway, caller)))


async def embeddings(body: EmbeddingsRequest, gateway: Gateway, caller: Caller) -> dict[str, Any]:
    """OpenAI's object. Raises what is wrong with the request, naming the field."""
    card, vectors = await _model(gateway, body.model)
    width = _width(body.dimensions, vectors)
    query = _is_query(body)
    asked = await _read(_asked(body), body, gateway, caller)
    inputs = [VectorInput(one.parts, one.instruction, query(one.parts)) for one in asked]
    made = await gateway.vectors.make(inputs, vectors.vector_model, caller)
    found = _all(made.found, asked)
    if width is not None:
        found = [cut(vector, width) for vector in found]
    tokens, images = (sum(getattr(one, name) for one in found) for name in ("tokens", "image_tokens"))
    as_base64 = body.encoding_format == "base64"
    data = [_embedding(place, one, vectors, as_base64=as_base64) for place, one in enumerate(found)]
    return {"object": "list", "data": data, "model": body.model or card.name, **_cost(made, tokens, images)}


async def ranked(body: RerankRequest, gateway: Gateway, caller: Caller) -> dict[str, Any]:
    """The documents, best first. Raises what is wrong with the request, naming the field."""
    card, vectors = await _model(gateway, body.model)
    sources = [_Source("query", body.query), *(_Source(f"documents.{n}", one) for n, one in enumerate(body.documents))]
    asked = await _read(sources, body, gateway, caller)
    query, *documents = asked
    compared = await _compared(query, [one.parts for one in documents], body, vectors, gateway, caller)
    scores = _all(compared.scores, documents)
    results = [
        {"index": place, "relevance_score": scores[place]}
        | ({} if body.return_documents is False else {"document": _shown(documents[place])})
        for place in _best(scores, body.top_n)
    ]
    return {
        "id": "rerank-" + uuid.uuid4().hex,
        "model": body.model or card.name,
        "results": results,
        **_cost(compared, compared.tokens, compared.image_tokens),
    }


async def found_images(body: SearchRequest, gateway: Gateway, caller: Caller) -> dict[str, Any]:
    """The images, best first. Raises what is wrong with the request, naming the field."""
    most = gateway.settings.max_searched
    if body.limit is not None and body.limit > most:
        raise invalid(f"'limit' is {body.limit}, the limit is {most}: search in pages by 'after'", param="limit")
    card, vectors = await _model(gateway, body.model)
    (query,) = await _read([_Source("query", body.query)], body, gateway, caller)
    page = await gateway.images.page(caller.tenant, limit=body.limit or most, after=body.after)
    images = [(ImagePart(record),) for record in page.records]
    compared = await _compared(query, images, body, vectors, gateway, caller)
    pairs = list(zip(page.records, compared.scores, strict=True))
    scored = [(record, score) for record, score in pairs if not isinstance(score, LookonceError)]
    scores = [score for _, score in scored]
    return {
        "object": "list",
        "model": body.model or card.name,
        "data": [_found(*scored[place]) for place in _best(scores, body.top_n)],
        "searched": len(scored),
        "skipped": [record.id for record, score in pairs if isinstance(score, LookonceError)],
        "last_id": page.records[-1].id if page.records else None,
        "has_more": page.has_more,
        **_cost(compared, compared.query.tokens, compared.query.image_tokens),
    }


async def _compared(
    query: _Input,
    documents: Sequence[tuple[str | ImagePart, ...]],
    body: RerankRequest | SearchRequest,
    vectors: language_pb2.VectorDescription,
    gateway: Gateway,
    caller: Caller,
) -> Compared:
    """How documents compare with the query. Raises what is wrong with that, naming its field."""
    asked = VectorInput(query.parts, body.instruction, query=True)
    inputs = [VectorInput(parts) for parts in documents]
    try:
        return await gateway.vectors.compare(asked, inputs, vectors.vector_model, caller)
    except LookonceError as error:
        param = error.param if error.param in (None, "instruction") else query.param
        raise LookonceError(error.kind, error.message, param=param, retry_after=error.retry_after) from error


async def _model(gateway: Gateway, requested: str | None) -> tuple[ModelCard, language_pb2.VectorDescription]:
    """The embedding model. Raises UNSUPPORTED where there is none, or another one was meant; NOT_FOUND for none of
    ours."""
    card = await gateway.embedding_model.card()
    if card.vectors is None:
        text = (
            f"{card.name!r} writes text and makes no vectors: start a language service of an embedding model "
            "(GME-Qwen2-VL, ColQwen2, or another with --task embed) and name it with --embed-lm of the gateway"
        )
        raise LookonceError(ErrorKind.UNSUPPORTED, text, param="model")
    if requested is not None and not card.is_named(requested):
        main = await gateway.model.card()
        if main is not card and main.is_named(requested):
            text = f"{requested!r} writes text and makes no vectors: ask {card.name!r}"
            raise LookonceError(ErrorKind.UNSUPPORTED, text, param="model")
        raise no_such_model(card)
    return card, card.vectors


def _width(dimensions: int | None, vectors: language_pb2.VectorDescription) -> int | None:
    """What vectors are cut to. Raises UNSUPPORTED for what the model wasn't trained for."""
    if dimensions is None or dimensions == vectors.width:
        return None
    if dimensions in vectors.cuts or (vectors.any_width and dimensions < vectors.width):
        return dimensions
    known = ", ".join(map(str, sorted({*vectors.cuts, vectors.width})))
    text = f"'dimensions' must be {f'at most {vectors.width}' if vectors.any_width else known}, got {dimensions}"
    raise LookonceError(ErrorKind.UNSUPPORTED, text, param="dimensions")


def _is_query(body: EmbeddingsRequest) -> Any:
    """Whether parts are a query: as the request says, or else if they are a text."""
    if body.input_type is not None:
        return lambda parts: body.input_type == "query"
    return lambda parts: all(isinstance(part, str) for part in parts)


@dataclass(frozen=True)
class _Source:
    """One input as the request has it, and the field it is in."""

    param: str
    value: Any
    instruction: str | None = None


@dataclass(frozen=True)
class _Input:
    """The same, its images kept."""

    param: str
    value: Any
    parts: tuple[str | ImagePart, ...]
    instruction: str | None = None


def _asked(body: EmbeddingsRequest) -> list[_Source]:
    if body.messages is not None:
        *system, user = body.messages
        said = "".join(part if isinstance(part, str) else part.text for one in system for part in one.content)  # type: ignore[union-attr]
        content = [TextPart(type="text", text=user.content)] if isinstance(user.content, str) else user.content
        return [_Source(f"messages.{len(system)}.content", content, said if system else body.instruction)]
    if isinstance(body.input, list):
        return [_Source(f"input.{place}", one, body.instruction) for place, one in enumerate(body.input)]
    return [_Source("input", body.input, body.instruction)]


async def _read(sources: Sequence[_Source], body: VectorFields, gateway: Gateway, caller: Caller) -> list[_Input]:
    """The inputs, their images fetched, kept and encoded. Raises what is wrong with them, naming the field."""
    settings, field = gateway.settings, sources[-1].param.partition(".")[0]
    if len(sources) > settings.max_inputs:
        raise invalid(f"the request has {len(sources)} inputs, the limit is {settings.max_inputs}", param=field)
    parts = [_parts(source) for source in sources]
    chars = sum(len(part) for one in parts for part in one.values() if isinstance(part, str))
    chars += sum(len(source.instruction or "") for source in sources)
    if chars > settings.max_text_chars:
        raise invalid(f"the text has {chars} characters, the limit is {settings.max_text_chars}", param=field)
    images = {name: part for one in parts for name, part in one.items() if isinstance(part, ImageUrlPart)}
    known = {name for name, part in images.items() if part.url.startswith(REFERENCE)}
    sent = [(name, part.url) for name, part in images.items() if name not in known]
    remote = check_images(sent, settings, field)
    files = await remote.fetch(gateway.fetcher, caller.tenant)
    bounds = asked_bounds(body.mm_processor_kwargs, "mm_processor_kwargs.")
    kept = await keep_all(images, files, gateway, caller.tenant, bounds=bounds)
    return [
        _Input(
            source.param,
            source.value,
            tuple(part if isinstance(part, str) else kept[name] for name, part in one.items()),
            source.instruction,
        )
        for source, one in zip(sources, parts, strict=True)
    ]


def _parts(source: _Source) -> dict[str, str | ImageUrlPart]:
    """The parts of an input by the fields that they are in, in the order in which the model is shown them."""
    value, param = source.value, source.param
    if isinstance(value, str):
        return {param: value}
    if isinstance(value, TextAndImage) and value.content is None:
        found: dict[str, str | ImageUrlPart] = {}
        if value.image is not None:
            found[f"{param}.image"] = ImageUrlPart(type="image_url", image_url=_url(value.image))
        return found | ({} if value.text is None else {f"{param}.text": value.text})
    content: Any = value
    if isinstance(value, TextAndImage):
        content, param = value.content, f"{param}.content"
    if not isinstance(content, list):
        return _part(param, content)
    return {name: part for place, one in enumerate(content) for name, part in _part(f"{param}.{place}", one).items()}


def _part(param: str, part: TextPart | ImageUrlPart) -> dict[str, str | ImageUrlPart]:
    return {f"{param}.{part.field}": part} if isinstance(part, ImageUrlPart) else {param: part.text}


def _url(image: str) -> str:
    """Of an image as Jina's API names them: an id or alias of ours, a URL, or base64."""
    if image.startswith(ID_PREFIX) or is_alias(image):
        return REFERENCE + image
    return image if ":" in image[:16] else f"data:image/png;base64,{image}"


def _all(outcomes: Sequence[T | LookonceError], asked: Iterable[_Input]) -> list[T]:
    """The outcomes. Raises the first error, naming its input."""
    found: list[T] = []
    for one, source in zip(outcomes, asked, strict=True):
        if isinstance(one, LookonceError):
            param = "instruction" if one.param == "instruction" else source.param
            raise LookonceError(one.kind, one.message, param=param, retry_after=one.retry_after)
        found.append(one)
    return found


def _embedding(place: int, vector: Vector, model: language_pb2.VectorDescription, *, as_base64: bool) -> dict[str, Any]:
    rows = np.ascontiguousarray(vector.rows, dtype="<f4")
    shown: Any = base64.b64encode(rows.tobytes()).decode() if as_base64 else rows if model.of_tokens else rows[0]
    shape = {"shape": list(rows.shape)} if model.of_tokens else {}
    return {"object": "embedding", "index": place, "embedding": shown, **shape}


def _best(scores: Sequence[float], most: int | None) -> list[int]:
    """Places by their scores, the best first; of equal ones the first."""
    return sorted(range(len(scores)), key=lambda place: -scores[place])[:most]


def _shown(one: _Input) -> dict[str, Any]:
    """A document as it was given, an image by its id."""
    kept = [part if isinstance(part, str) else part.record.id for part in one.parts]
    if isinstance(one.value, str):
        return {"text": one.value}
    if isinstance(one.value, TextAndImage) and one.value.content is None:
        names = [name for name in ("image", "text") if getattr(one.value, name) is not None]
        return dict(zip(names, kept, strict=True))
    parts = zip(one.parts, kept, strict=True)
    return {"content": [{"text" if isinstance(part, str) else "image": shown} for part, shown in parts]}


def _found(record: ImageRecord, score: float) -> dict[str, Any]:
    return {"id": record.id, "score": score, "image": image_object(record)}


def _cost(made: Made | Compared, tokens: int, images: int) -> dict[str, Any]:
    usage = {
        "prompt_tokens": tokens,
        "total_tokens": tokens,
        "prompt_tokens_details": {"image_tokens": images},
    }
    receipt = {"encoded": made.encoded, "prefill_tokens": made.prefill_tokens, "kept": made.kept}
    return {"usage": usage, "receipt": receipt}
