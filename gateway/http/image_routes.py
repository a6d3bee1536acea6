"""/v1/images: look, list, keep differently, name, erase. Uploading is in `uploads`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from gateway.http import examples
from gateway.http.field_errors import read_json
from gateway.http.openapi import answers, json_body, operation, query
from gateway.http.retention import retention_of
from gateway.http.route import gateway_of, json_response, tenant_of
from gateway.images.image_records import ImageRecord
from gateway.images.library import Resolved
from gateway.schemas.question_bodies import ImageChange
from gateway.schemas.responses import ErasedImage, ImageList, ImageObject
from lookonce.core.errors import invalid

router = APIRouter(tags=["images"])
DEFAULT_PAGE = 20
MAX_PAGE = 100
_PAGE = {"type": "integer", "minimum": 1, "maximum": MAX_PAGE, "default": DEFAULT_PAGE}
_PARAMETERS = [
    query("limit", "most images in the answer", _PAGE),
    query("after", "the id of the last image seen", {"type": "string"}),
]


@router.get(
    "/v1/images",
    openapi_extra=operation("listImages", "List images", answers(ImageList, examples.IMAGES), parameters=_PARAMETERS),
)
async def listed(request: Request) -> Response:
    """The images that are kept, newest first. The next page is `after` the `last_id` of this one."""
    page = await gateway_of(request).images.page(
        tenant_of(request), limit=_limit(request), after=request.query_params.get("after")
    )
    data = [image_object(record) for record in page.records]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return json_response({"object": "list", "data": data, **ends, "has_more": page.has_more})


@router.get(
    "/v1/images/{image_id}",
    openapi_extra=operation("getImage", "Look at an image", answers(ImageObject, examples.IMAGE)),
)
async def look(request: Request, image_id: str) -> Response:
    """What is known of an image. An alias may stand wherever an id does."""
    return json_response(image_object(await gateway_of(request).images.get(image_id, tenant_of(request))))


@router.patch(
    "/v1/images/{image_id}",
    openapi_extra=operation(
        "changeImage",
        "Keep an image differently",
        json_body(ImageChange, examples.CHANGES),
        answers(ImageObject, examples.IMAGE),
        errors=(403,),
    ),
)
async def change(request: Request, image_id: str) -> Response:
    """Set how long an image is kept (from now, and from each upload of it), pin it, give it one alias more.

    An alias that another image has goes over to this one."""
    gateway = gateway_of(request)
    body = await read_json(request, ImageChange)
    retention = retention_of(body, gateway.settings)
    return json_response(image_object(await gateway.images.change(image_id, tenant_of(request), retention)))


@router.delete(
    "/v1/images/{image_id}",
    openapi_extra=operation("eraseImage", "Erase an image", answers(ErasedImage, examples.ERASED)),
)
async def erase(request: Request, image_id: str) -> Response:
    """Erase an image, its aliases, its embeddings and all that was made from them, in every process.

    `complete` is false when a process could not confirm: erasure then goes on by itself."""
    erased = await gateway_of(request).images.delete(image_id, tenant_of(request))
    return json_response({"id": erased.id, "object": "image", "deleted": True, "complete": erased.complete})


@router.delete(
    "/v1/images/{image_id}/aliases/{alias}",
    openapi_extra=operation("dropAlias", "Take an alias away", answers(ImageObject, examples.IMAGE | {"aliases": []})),
)
async def unname(request: Request, image_id: str, alias: str) -> Response:
    """Take one alias away from an image; the image stays."""
    return json_response(image_object(await gateway_of(request).images.unname(image_id, alias, tenant_of(request))))


def image_object(record: ImageRecord, resolved: Resolved | None = None) -> dict[str, Any]:
    """The image as the API shows it; `cached` only where it was just uploaded."""
    reference = resolved.reference if resolved else record.reference
    fields: dict[str, Any] = {
        "id": record.id,
        "object": "image",
        "bytes": record.size,
        "width": reference.width if reference else None,
        "height": reference.height if reference else None,
        "tokens": reference.tokens if reference else None,
        "status": "ready",
        "created_at": int(record.created),
        "expires_at": None if record.pinned else int(record.expires),
        "pinned": record.pinned,
        "aliases": list(record.aliases),
    }
    if resolved is not None:
        fields["cached"] = resolved.outcome != "miss"
        fields["encode_ms"] = round(resolved.encode_ms, 3)
        if resolved.notice:
            fields["notice"] = resolved.notice
    return fields


def _limit(request: Request) -> int:
    text = request.query_params.get("limit", str(DEFAULT_PAGE))
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and 1 <= int(text) <= MAX_PAGE):
        raise invalid(f"'limit' must be a whole number from 1 to {MAX_PAGE}", param="limit")
    return int(text)
