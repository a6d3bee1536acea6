"""/v1/images: upload (a file by multipart, as base64 or at a URL), look, list, keep differently, name, erase."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic.json_schema import SkipJsonSchema
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request
from starlette.responses import Response

from gateway.conversation import ChoiceQuestion, ImagePart, Turn
from gateway.http.error_bodies import HttpRefusal
from gateway.http.openapi import upload_body
from gateway.http.request_images import asked_bounds, base64_of, check_size, decode, decoded_size
from gateway.http.route import (
    Route,
    caller_of,
    gateway_of,
    json_response,
    list_object,
    read_json,
    tenant_of,
    until_disconnect,
    validate,
    whole,
)
from gateway.images.encoder import Resolved
from gateway.images.image_records import ImageRecord
from gateway.images.index import check_alias
from gateway.images.library import Retention
from gateway.images.pixel_bounds import PixelBounds
from gateway.schemas.requests import ImageChange, ImageUpload
from gateway.schemas.responses import ErasedImage, ErrorBody, ImageList, ImageObject
from gateway.settings import GatewaySettings
from lookonce.core.errors import ErrorKind, LookonceError, invalid

router = APIRouter(tags=["images"], route_class=Route)
MAX_PAGE = 100
_WHOLE = "^[1-9][0-9]{0,9}$"
FORM_FIELDS: Mapping[str, Any] = {
    "ttl": {"type": "string", "pattern": _WHOLE, "description": "seconds to keep the image"},
    "pinned": {"type": "string", "enum": ["true", "false"], "description": "keep it until it is erased"},
    "alias": {"type": "string", "minLength": 1, "maxLength": 64, "description": "a name to use in place of the id"},
    "prefill": {
        "type": "string",
        "enum": ["true", "false"],
        "description": "also fill the prefix of questions to come",
    },
    "min_pixels": {"type": "string", "pattern": _WHOLE, "description": "fewest pixels of the resized image"},
    "max_pixels": {"type": "string", "pattern": _WHOLE, "description": "most pixels of the resized image"},
}
_NUMBERS = {"ttl": "seconds", "min_pixels": "pixels", "max_pixels": "pixels"}  # fields of whole numbers, their units
_TRUTH = {"true": True, "false": False}


@router.post(
    "/v1/images",
    summary="Upload an image",
    response_model=ImageObject,
    responses={403: {"model": ErrorBody}},
    openapi_extra=upload_body(FORM_FIELDS, model=ImageUpload),
)
async def upload_image(request: Request) -> Response:
    """Keep an image and encode it. The same file has the same id; uploading it again keeps it for longer."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        upload = await _from_form(request)
    elif kind == "application/json":
        upload = await _from_json(request)
    else:
        text = "send multipart/form-data with the field 'file', or application/json"
        raise HttpRefusal(415, "unsupported_media_type", text, param="content-type")
    adding = gateway_of(request).images.add(
        upload.data, tenant_of(request), bounds=upload.bounds, verify=True, retention=upload.retention
    )
    try:
        record, resolved = await until_disconnect(request, adding)
    except LookonceError as error:
        if error.kind in (ErrorKind.IMAGE_INVALID, ErrorKind.IMAGE_TOO_LARGE):
            raise LookonceError(error.kind, error.message, param=upload.param) from error
        raise
    shown = image_object(record, resolved)
    if upload.prefill:
        await until_disconnect(request, _prefill(ImagePart(record, upload.bounds, resolved), request))
        shown["prefilled"] = True
    return json_response(shown)


async def _prefill(image: ImagePart, request: Request) -> None:
    """Have the language service compute what every question about the image begins with. Raises its error."""
    gateway = gateway_of(request)
    question = ChoiceQuestion("prefill", (Turn("user", (image, "?")),), ("yes",))
    (outcome,), _, _ = await gateway.answers.score([question], caller_of(request))
    if isinstance(outcome, LookonceError):
        raise outcome


@router.get("/v1/images", summary="List images", response_model=ImageList, response_model_exclude_unset=True)
async def list_images(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE, description="most images in the answer"), whole(MAX_PAGE)] = 20,
    after: Annotated[str | SkipJsonSchema[None], Query(description="the id of the last image seen")] = None,
) -> dict[str, Any]:
    """The images that are kept, newest first. The next page is `after` the `last_id` of this one."""
    page = await gateway_of(request).images.page(tenant_of(request), limit=limit, after=after)
    return list_object([image_object(record) for record in page.records], more=page.has_more)


@router.get(
    "/v1/images/{image_id}", summary="Look at an image", response_model=ImageObject, response_model_exclude_unset=True
)
async def get_image(request: Request, image_id: str) -> dict[str, Any]:
    """What is known of an image. An alias may stand wherever an id does."""
    return image_object(await gateway_of(request).images.get(image_id, tenant_of(request)))


@router.patch(
    "/v1/images/{image_id}",
    summary="Keep an image differently",
    response_model=ImageObject,
    response_model_exclude_unset=True,
    responses={403: {"model": ErrorBody}},
)
async def change_image(request: Request, image_id: str, body: ImageChange) -> dict[str, Any]:
    """Set how long an image is kept (from now, and from each upload of it), pin it, give it one alias more.

    An alias that another image has goes over to this one."""
    gateway = gateway_of(request)
    retention = _retention(body, gateway.settings)
    return image_object(await gateway.images.change(image_id, tenant_of(request), retention))


@router.delete("/v1/images/{image_id}", summary="Erase an image", response_model=ErasedImage)
async def erase_image(request: Request, image_id: str) -> dict[str, Any]:
    """Erase an image, its aliases, its embeddings and all that was made from them, in every process.

    `complete` is false when a process could not confirm: erasure then goes on by itself."""
    identifier, complete = await gateway_of(request).images.delete(image_id, tenant_of(request))
    return {"id": identifier, "object": "image", "deleted": True, "complete": complete}


@router.delete(
    "/v1/images/{image_id}/aliases/{alias}",
    summary="Take an alias away",
    response_model=ImageObject,
    response_model_exclude_unset=True,
)
async def drop_alias(request: Request, image_id: str, alias: str) -> dict[str, Any]:
    """Take one alias away from an image; the image stays."""
    return image_object(await gateway_of(request).images.unname(image_id, alias, tenant_of(request)))


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


@dataclass(frozen=True)
class _Upload:
    """A file, the field it came in, how it is to be kept, and resized."""

    data: bytes
    param: str
    retention: Retention
    bounds: PixelBounds
    prefill: bool = False


async def _from_json(request: Request) -> _Upload:
    gateway = gateway_of(request)
    limit = gateway.settings.max_image_bytes
    body = await read_json(request, ImageUpload)
    if (body.data is None) == (body.url is None):
        raise invalid("give exactly one of 'data' and 'url'", param="data")
    retention, bounds = _retention(body, gateway.settings), asked_bounds(body)
    if body.url is not None:
        tenant = tenant_of(request)
        fetched = gateway.fetcher.fetch(body.url, param="url", max_bytes=limit, owner=tenant.name)
        return _Upload(await until_disconnect(request, fetched), "url", retention, bounds, bool(body.prefill))
    data = body.data or ""
    payload = base64_of(data, "data") if data[:5].lower() == "data:" else data
    check_size(decoded_size(payload), limit, "data")
    return _Upload(await decode(payload, "data"), "data", retention, bounds, bool(body.prefill))


async def _from_form(request: Request) -> _Upload:
    settings = gateway_of(request).settings
    async with request.form(max_files=1, max_fields=len(FORM_FIELDS), max_part_size=1024) as form:
        body = validate(_form_values(form), ImageUpload)
        retention, bounds = _retention(body, settings), asked_bounds(body)
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise invalid("'file' is required, as a file", param="file")
        check_size(file.size or 0, settings.max_image_bytes, "file")
        return _Upload(await file.read(), "file", retention, bounds, bool(body.prefill))


def _form_values(form: FormData) -> dict[str, Any]:
    """The fields beside the file, as JSON would have them."""
    values: dict[str, Any] = {}
    for name, value in form.multi_items():
        if name == "file":
            continue
        if name not in FORM_FIELDS:
            raise invalid(f"the form takes the fields 'file', {', '.join(map(repr, FORM_FIELDS))}", param=name[:100])
        if isinstance(value, UploadFile) or name in values:
            raise invalid(f"'{name}' must be one text field", param=name)
        values[name] = value
    for name in _NUMBERS.keys() & values.keys():
        text = values[name]
        if not (text.isascii() and text.isdigit() and len(text) <= 10):
            raise invalid(f"'{name}' must be a whole number of {_NUMBERS[name]}", param=name)
        values[name] = int(text)
    for name in ("pinned", "prefill"):
        if name in values:
            if values[name] not in _TRUTH:
                raise invalid(f"'{name}' must be true or false", param=name)
            values[name] = _TRUTH[values[name]]
    return values


def _retention(body: ImageChange, settings: GatewaySettings) -> Retention:
    """How an image is to be kept, within the gateway's limits. Raises INVALID_ARGUMENT; PERMISSION_DENIED for pins
    where there are none."""
    if body.ttl is not None and body.ttl > settings.max_image_ttl:
        text = f"'ttl' is {body.ttl} seconds, the limit is {settings.max_image_ttl:.0f}"
        raise invalid(text, param="ttl")
    if body.ttl is not None and body.pinned:
        raise invalid("give one of 'ttl' and 'pinned'", param="ttl")
    if body.pinned and not settings.pinning:
        raise LookonceError(ErrorKind.PERMISSION_DENIED, "pinning images is switched off here", param="pinned")
    alias = None if body.alias is None else check_alias(body.alias, "alias")
    pinned = False if body.ttl is not None and body.pinned is None else body.pinned
    return Retention(None if body.ttl is None else float(body.ttl), pinned, alias)
