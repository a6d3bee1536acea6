"""/v1/models, and what operators look at: health, readiness, metrics."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import Response

from gateway.http import examples
from gateway.http.openapi import answers, answers_text, operation
from gateway.http.route import gateway_of, json_response
from gateway.schemas.responses import Health, Model, ModelList, Readiness, Version
from gateway.served_model import no_such_model
from lookonce.core.version import __version__

router = APIRouter()


@router.get(
    "/v1/models",
    openapi_extra=operation("listModels", "List models", answers(ModelList, examples.MODELS)),
    tags=["models"],
)
async def models(request: Request) -> Response:
    """The one model that is served, once for each of its names."""
    card = await gateway_of(request).model.card()
    return json_response({"object": "list", "data": [card.to_openai(name) for name in card.names]})


@router.get(
    "/v1/models/{model:path}",
    openapi_extra=operation("getModel", "Look at a model", answers(Model, examples.MODEL)),
    tags=["models"],
)
async def model(request: Request, model: str) -> Response:
    """The model, if that is one of its names; "lookonce" always is."""
    card = await gateway_of(request).model.card()
    if not card.is_named(model):
        raise no_such_model(card)
    return json_response(card.to_openai(model))


@router.head("/healthz", include_in_schema=False)
@router.get(
    "/healthz",
    openapi_extra=operation("health", "Whether the process runs", answers(Health, examples.HEALTH)),
    tags=["operation"],
)
async def healthz() -> Response:
    """Whether the process runs."""
    return json_response({"status": "ok"})


@router.head("/readyz", include_in_schema=False)
@router.get(
    "/readyz",
    openapi_extra=operation(
        "readiness", "Whether requests can be answered", answers(Readiness, examples.READINESS, statuses=(200, 503))
    ),
    tags=["operation"],
)
async def readyz(request: Request) -> Response:
    """Ready while a language service answers: cached images can be asked about. Without a vision service or with a
    degraded store the gateway stays ready, and says so. Counts only, no addresses: anyone may ask."""
    gateway = gateway_of(request)
    vision, language = await gateway.variants.health()
    ready = any(language.values()) and not request.app.state.draining
    parts = {
        "language": {"serving": sum(language.values()), "configured": len(language)},
        "vision": {"serving": sum(vision.values()), "configured": len(vision)},
        "image_store": "degraded" if gateway.shelf.degraded else "ok",
    }
    whole = all(vision.values()) and all(language.values()) and not gateway.shelf.degraded
    status = "unavailable" if not ready else "ready" if whole else "degraded"
    return json_response({"status": status, "parts": parts}, 200 if ready else 503)


@router.head("/health", include_in_schema=False)
@router.get(
    "/health",
    openapi_extra=operation(
        "healthOfAll", "The same, as vLLM names it", answers(Readiness, examples.READINESS, statuses=(200, 503))
    ),
    tags=["operation"],
)
async def health(request: Request) -> Response:
    """`/readyz` under the name that clients of vLLM ask for."""
    return await readyz(request)


@router.head("/version", include_in_schema=False)
@router.get(
    "/version",
    openapi_extra=operation("version", "Which version runs", answers(Version, examples.VERSION)),
    tags=["operation"],
)
async def version() -> Response:
    """The version of the gateway."""
    return json_response({"version": __version__})


@router.head("/metrics", include_in_schema=False)
@router.get(
    "/metrics",
    openapi_extra=operation("metrics", "Measurements", answers_text("text/plain", examples.METRICS)),
    tags=["operation"],
)
async def metrics() -> Response:
    """Prometheus's text format."""
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)
