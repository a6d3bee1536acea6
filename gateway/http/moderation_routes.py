"""/v1/moderations: OpenAI's request in, the policy's verdict out."""

from __future__ import annotations

import uuid
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from gateway.conversation import Caller
from gateway.core import Gateway
from gateway.http.request_images import check_images, keep_all
from gateway.http.route import Route, caller_of, gateway_of, json_response, until_disconnect
from gateway.images.pixel_bounds import PixelBounds
from gateway.moderations import Item, Moderations
from gateway.schemas.requests import ImageUrlPart, ModerationRequest
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
    items = [body.input] if isinstance(body.input, str) else body.input
    images = {_param(place, item): item for place, item in enumerate(items) if isinstance(item, ImageUrlPart)}
    settings = gateway.settings
    chars = sum(len(item) if isinstance(item, str) else len(getattr(item, "text", "")) for item in items)
    if chars > settings.max_text_chars:
        raise invalid(f"the input has {chars} characters, the limit is {settings.max_text_chars}", param="input")
    remote = check_images([(name, image.url) for name, image in images.items()], settings, "input")
    await gateway.model.check(None if (body.model or "").startswith(OPENAI_MODELS) else body.model)
    files = await remote.fetch(gateway.fetcher, caller.tenant)
    kept = await keep_all(images, files, gateway, caller.tenant, bounds=PixelBounds(max=gateway.policy.max_pixels))
    parts: list[Item] = [
        kept[_param(place, item)] if isinstance(item, ImageUrlPart) else item if isinstance(item, str) else item.text
        for place, item in enumerate(items)
    ]
    inputs = [[part] for part in parts] if isinstance(items[0], str) else [parts]
    moderations = Moderations(gateway.policy, gateway.answers, gateway.model, concurrency=settings.question_concurrency)
    results = await moderations.moderate(inputs, caller)
    return {"id": "modr-" + uuid.uuid4().hex, "model": gateway.model.name, "results": results}


def _param(place: int, part: ImageUrlPart) -> str:
    return f"input.{place}.{part.field}"
