"""/v1/moderations: OpenAI's request in, the policy's verdict out."""

from __future__ import annotations

import uuid
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from gateway.conversation import Caller
from gateway.core import Gateway
from gateway.http.event_stream import until_disconnect
from gateway.http.request_images import RemoteImages, check_images, keep_all
from gateway.http.route import Route, caller_of, gateway_of, json_response
from gateway.moderations import Item, Moderations
from gateway.schemas.requests import ImageUrlPart, ModerationRequest, TextPart
from gateway.schemas.responses import ModerationObject
from lookonce.core.errors import ErrorKind, LookonceError, invalid

router = APIRouter(tags=["moderations"], route_class=Route)
OPENAI_MODELS = ("omni-moderation-", "text-moderation-")
"""Names that OpenAI's users send; the policy decides here, whatever the name."""


@router.post("/v1/moderations", summary="Moderate images and texts", response_model=ModerationObject)
async def create_moderation(request: Request, body: ModerationRequest) -> Response:
    """Score images and texts against the categories of the configured policy, as OpenAI's API does."""
    moderated = moderate(body, gateway_of(request), caller_of(request))
    return json_response(await until_disconnect(request, moderated))


async def moderate(body: ModerationRequest, gateway: Gateway, caller: Caller) -> dict[str, Any]:
    """The moderation object. Raises what is wrong with the request, UNSUPPORTED without a policy."""
    if gateway.policy is None:
        raise LookonceError(
            ErrorKind.UNSUPPORTED,
            "this server has no moderation policy: start the gateway with --policy FILE or LOOKONCE_GATEWAY_POLICY",
        )
    remote = _check(body, gateway)
    named = body.model if body.model is None or not body.model.startswith(OPENAI_MODELS) else None
    await gateway.model.check(named)
    inputs = await _inputs(body, gateway, caller, remote)
    settings = gateway.settings
    moderations = Moderations(gateway.policy, gateway.answers, gateway.model, concurrency=settings.question_concurrency)
    results = await moderations.moderate(inputs, caller)
    return {"id": "modr-" + uuid.uuid4().hex, "model": gateway.model.name, "results": results}


def _check(body: ModerationRequest, gateway: Gateway) -> RemoteImages:
    items = [body.input] if isinstance(body.input, str) else body.input
    chars = sum(len(item) if isinstance(item, str) else len(getattr(item, "text", "")) for item in items)
    limit = gateway.settings.max_text_chars
    if chars > limit:
        raise invalid(f"the input has {chars} characters, the limit is {limit}", param="input")
    urls = [(_param(place, item), item.url) for place, item in enumerate(items) if isinstance(item, ImageUrlPart)]
    return check_images(urls, gateway.settings, "input")


async def _inputs(body: ModerationRequest, gateway: Gateway, caller: Caller, remote: RemoteImages) -> list[list[Item]]:
    if isinstance(body.input, str):
        return [[body.input]]
    files = await remote.fetch(gateway.fetcher, caller.tenant)
    images = {_param(place, item): item for place, item in enumerate(body.input) if isinstance(item, ImageUrlPart)}
    most = gateway.policy.max_pixels if gateway.policy is not None else None
    kept = await keep_all(images, files, gateway, caller.tenant, max_pixels=most)
    parts: list[Item] = []
    for place, item in enumerate(body.input):
        if isinstance(item, str):
            parts.append(item)
        elif isinstance(item, TextPart):
            parts.append(item.text)
        else:
            parts.append(kept[_param(place, item)])
    return [[part] for part in parts] if isinstance(body.input[0], str) else [parts]


def _param(place: int, part: ImageUrlPart) -> str:
    return f"input.{place}.{part.field}"
