"""/v1/models, and what operators look at: health, readiness, metrics."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import Response

from gateway.http import examples
from gateway.http.context import gateway_of, json_response
from gateway.http.openapi import answers, answers_text, operation
from gateway.schemas.responses import Health, Model, ModelList, Readiness
from lookonce.errors import ErrorKind, LookonceError

router = APIRouter()


@router.get(
    "/v1/models",
    openapi_extra=operation("listModels", "List models", answers(ModelList, examples.MODELS)),
    tags=["models"],
)
async def models(request: Request) -> Response:
    """The one model that is served."""
    card = await gateway_of(request).model.card()
    return json_response({"object": "list", "data": [card.to_openai()]})


@router.get(
    "/v1/models/{model:path}",
    openapi_extra=operation("getModel", "Look at a model", answers(Model, examples.MODEL)),
    tags=["models"],
)
async def model(request: Request, model: str) -> Response:
    """The model, if that is its name."""
    card = await gateway_of(request).model.card()
    if model != card.name:
        raise LookonceError(ErrorKind.NOT_FOUND, "no such model", param="model")
    return json_response(card.to_openai())


@router.get(
    "/healthz",
    openapi_extra=operation("health", "Whether the process runs", answers(Health, examples.HEALTH)),
    tags=["operation"],
)
async def healthz() -> Response:
    """Whether the process runs."""
    return json_response({"status": "ok"})


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


@router.get(
    "/metrics",
    openapi_extra=operation("metrics", "Measurements", answers_text("text/plain", examples.METRICS)),
    tags=["operation"],
)
async def metrics() -> Response:
    """Prometheus's text format."""
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)
