"""POST /v1/images: a file by multipart, as base64 or at a URL."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import APIRouter
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request
from starlette.responses import Response

from gateway.http import examples
from gateway.http.data_urls import base64_of, check_size, decode, decoded_size
from gateway.http.error_bodies import HttpRefusal
from gateway.http.event_stream import until_disconnect
from gateway.http.field_errors import read_json
from gateway.http.image_routes import image_object
from gateway.http.openapi import answers, operation, upload_body
from gateway.http.retention import FORM_FIELDS, form_change, retention_of
from gateway.http.route import gateway_of, json_response, tenant_of
from gateway.images.library import Retention
from gateway.schemas.question_bodies import ImageUpload
from gateway.schemas.responses import ImageObject
from lookonce.core.errors import ErrorKind, LookonceError, invalid

router = APIRouter(tags=["images"])


@dataclass(frozen=True)
class _Received:
    data: bytes
    param: str  # the name of the field it came in
    retention: Retention


@router.post(
    "/v1/images",
    openapi_extra=operation(
        "uploadImage",
        "Upload an image",
        upload_body(ImageUpload, FORM_FIELDS, examples.UPLOADS),
        answers(ImageObject, examples.UPLOADED),
        errors=(403,),
    ),
)
async def upload(request: Request) -> Response:
    """Keep an image and encode it. The same file has the same id; uploading it again keeps it for longer."""
    received = await _received(request)
    adding = gateway_of(request).images.add(
        received.data, tenant_of(request), verify=True, retention=received.retention
    )
    try:
        record, resolved = await until_disconnect(request, adding)
    except LookonceError as error:
        if error.kind in (ErrorKind.IMAGE_INVALID, ErrorKind.IMAGE_TOO_LARGE):
            raise LookonceError(error.kind, error.message, param=received.param) from error
        raise
    return json_response(image_object(record, resolved))


async def _received(request: Request) -> _Received:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _from_form(request)
    if kind != "application/json":
        text = "send multipart/form-data with the field 'file', or application/json"
        raise HttpRefusal(415, "unsupported_media_type", text, param="content-type")
    return await _from_json(request)


async def _from_json(request: Request) -> _Received:
    gateway = gateway_of(request)
    limit = gateway.settings.max_image_bytes
    body = await read_json(request, ImageUpload)
    if (body.data is None) == (body.url is None):
        raise invalid("give exactly one of 'data' and 'url'", param="data")
    retention = retention_of(body, gateway.settings)
    if body.url is not None:
        tenant = tenant_of(request)
        fetched = gateway.fetcher.fetch(body.url, param="url", max_bytes=limit, owner=tenant.name)
        return _Received(await until_disconnect(request, fetched), "url", retention)
    data = body.data or ""
    payload = base64_of(data, "data") if data[:5].lower() == "data:" else data
    check_size(decoded_size(payload), limit, "data")
    return _Received(await decode(payload, "data"), "data", retention)


async def _from_form(request: Request) -> _Received:
    settings = gateway_of(request).settings
    async with request.form(max_files=1, max_fields=len(FORM_FIELDS), max_part_size=1024) as form:
        retention = retention_of(form_change(_texts(form)), settings)
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise invalid("'file' is required, as a file", param="file")
        check_size(file.size or 0, settings.max_image_bytes, "file")
        return _Received(await file.read(), "file", retention)


def _texts(form: FormData) -> dict[str, str]:
    """The fields beside the file."""
    texts = {}
    for name, value in form.multi_items():
        if name == "file":
            continue
        if name not in FORM_FIELDS:
            raise invalid(f"the form takes the fields 'file', {', '.join(map(repr, FORM_FIELDS))}", param=name[:100])
        if isinstance(value, UploadFile) or name in texts:
            raise invalid(f"'{name}' must be one text field", param=name)
        texts[name] = value
    return texts
