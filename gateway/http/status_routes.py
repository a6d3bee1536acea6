"""/v1/models, what operators look at (health, readiness, metrics), and what there is in place of others' routes."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from gateway.http import examples
from gateway.http.route import gateway_of, json_response
from gateway.routing.variants import ModelCard, no_such_model
from gateway.schemas.responses import Health, Model, ModelList, Readiness, Version
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.version import __version__

models = APIRouter(tags=["models"])
operation = APIRouter(tags=["operation"])
unserved = APIRouter(include_in_schema=False)
CHAT = "/v1/chat/completions"
INSTEAD = {
    "/v1/responses/{rest:path}": CHAT,
    "/v1/completions": CHAT,
    "/v1/messages/{rest:path}": "/v1/messages",
    "/v1/images/generations": "/v1/images, which takes images and makes none",
    "/v1/images/edits": "/v1/images, which takes images and makes none",
    "/v1/score": "/v1/images/{id}/questions with choices",
    "/rerank": "/v1/rerank",
    "/v2/rerank": "/v1/rerank",
    "/tokenize": "the usage in each answer of " + CHAT,
    "/detokenize": CHAT,
}
"""Paths of OpenAI's and vLLM's routes that clients try and this server hasn't, and what serves the purpose here."""


@models.get("/v1/models", summary="List models", response_model=ModelList)
async def list_models(request: Request) -> dict[str, Any]:
    """The model that is served, once for each of its names; then the embedding model beside it, if there is one."""
    return {"object": "list", "data": [card.to_openai(name) for card in await _cards(request) for name in card.names]}


@models.get("/v1/models/{model:path}", summary="Look at a model", response_model=Model)
async def get_model(request: Request, model: str) -> dict[str, Any]:
    """The model that has that name; "lookonce" always is one."""
    cards = await _cards(request)
    card = next((card for card in cards if card.is_named(model)), None)
    if card is None:
        raise no_such_model(*cards)
    return card.to_openai(model)


async def _cards(request: Request) -> list[ModelCard]:
    gateway = gateway_of(request)
    models = dict.fromkeys((gateway.model, gateway.embedding_model))
    return [await model.card() for model in models]


@operation.head("/healthz", include_in_schema=False)
@operation.get("/healthz", summary="Whether the process runs", response_model=Health)
async def health() -> dict[str, Any]:
    """Whether the process runs."""
    return {"status": "ok"}


@operation.head("/readyz", include_in_schema=False)
@operation.get(
    "/readyz",
    summary="Whether requests can be answered",
    response_model=Readiness,
    responses={503: {"model": Readiness}},
)
async def readiness(request: Request) -> Response:
    """Ready while a language service answers: cached images can be asked about. Without a vision service or with a
    degraded store the gateway stays ready, and says so. Counts only, no addresses: anyone may ask."""
    gateway = gateway_of(request)
    vision, language = await gateway.variants.health()
    ready = any(language.values()) and not request.app.state.draining
    parts = {
        "language": {"serving": sum(language.values()), "configured": len(language)},
        "vision": {"serving": sum(vision.values()), "configured": len(vision)},
        "image_store": "degraded" if gateway.images.degraded else "ok",
    }
    whole = all(vision.values()) and all(language.values()) and not gateway.images.degraded
    status = "unavailable" if not ready else "ready" if whole else "degraded"
    return json_response({"status": status, "parts": parts}, 200 if ready else 503)


@operation.head("/health", include_in_schema=False)
@operation.get(
    "/health", summary="The same, as vLLM names it", response_model=Readiness, responses={503: {"model": Readiness}}
)
async def health_of_all(request: Request) -> Response:
    """`/readyz` under the name that clients of vLLM ask for."""
    return await readiness(request)


@operation.head("/version", include_in_schema=False)
@operation.get("/version", summary="Which version runs", response_model=Version)
async def version() -> dict[str, Any]:
    """The version of the gateway."""
    return {"version": __version__}


@operation.head("/metrics", include_in_schema=False)
@operation.get(
    "/metrics",
    summary="Measurements",
    response_class=PlainTextResponse,
    responses={200: {"content": {"text/plain": {"example": examples.METRICS}}}},
)
async def metrics() -> Response:
    """Prometheus's text format."""
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


def _refuse(path: str, instead: str) -> None:
    async def refuse(request: Request) -> Response:
        text = f"this server has no {request.url.path[:100]}: use {instead}"
        raise LookonceError(ErrorKind.NOT_FOUND, text)

    others = () if path.startswith("/v1/images/") else ("GET", "HEAD", "DELETE")  # there they could be an image's
    unserved.add_api_route(path, refuse, methods=["POST", *others])


for _path, _instead in INSTEAD.items():
    _refuse(_path, _instead)
