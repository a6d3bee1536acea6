"""/v1/files: what batches read and write, as in OpenAI's API."""

from __future__ import annotations

import re

from fastapi import APIRouter
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from gateway.batches.service import Batches
from gateway.http import job_examples
from gateway.http.field_errors import UnknownField
from gateway.http.openapi import answers, operation, query
from gateway.http.pages import check_names, limit_of, list_object
from gateway.http.route import gateway_of, json_response, tenant_of
from gateway.schemas.batch_bodies import MAX_LIFETIME, MIN_LIFETIME, DeletedFile, FileList, FileObject
from lookonce.core.errors import ErrorKind, LookonceError, invalid
from lookonce.core.units import format_size

router = APIRouter(tags=["files"])
MOST_LISTED = 10_000
MAX_FILENAME = 255
_ANCHOR, _SECONDS = "expires_after[anchor]", "expires_after[seconds]"
_FIELDS = ("file", "purpose", _ANCHOR, _SECONDS)
_UNSHOWN = re.compile(r"[\x00-\x1f\x7f]")
_FORM = {
    "type": "object",
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": ["batch"]},
        _ANCHOR: {"type": "string", "enum": ["created_at"]},
        _SECONDS: {"type": "integer", "minimum": MIN_LIFETIME, "maximum": MAX_LIFETIME},
    },
    "required": ["file", "purpose"],
    "additionalProperties": False,
}
_UPLOAD = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}}
_CONTENT = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
_PARAMETERS = [
    query("limit", "most files in the answer", {"type": "integer", "minimum": 1, "maximum": MOST_LISTED}),
    query("after", "the id of the last file seen", {"type": "string"}),
    query("order", "by age", {"type": "string", "enum": ["asc", "desc"], "default": "desc"}),
    query("purpose", "only files of this purpose", {"type": "string"}),
]


def batches_of(request: Request) -> Batches:
    """Files and batches. Raises UNSUPPORTED without a data directory."""
    batches = gateway_of(request).batches
    if batches is None:
        text = "this server keeps no files: start the gateway with --data-dir DIR or LOOKONCE_GATEWAY_DATA_DIR"
        raise LookonceError(ErrorKind.UNSUPPORTED, text)
    return batches


@router.post(
    "/v1/files",
    openapi_extra=operation("createFile", "Upload a file", _UPLOAD, answers(FileObject, job_examples.FILE)),
)
async def upload(request: Request) -> Response:
    """Keep a JSONL file of requests for a batch. `purpose` is "batch"."""
    batches, settings = batches_of(request), gateway_of(request).settings
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise invalid("send multipart/form-data with the fields 'file' and 'purpose'", param="content-type")
    async with request.form(max_files=1, max_fields=3, max_part_size=1024) as form:
        file, lifetime = _check(form, settings.file_ttl)
        size = file.size or 0
        if size > settings.max_file_bytes:
            limit = format_size(settings.max_file_bytes)
            raise invalid(f"'file' has {format_size(size)}, the limit is {limit}", param="file")
        if size == 0:
            raise invalid("'file' is empty", param="file")
        name = _UNSHOWN.sub("", file.filename or "")[:MAX_FILENAME] or "file"
        stored = await batches.files.add(tenant_of(request).name, name, file.file, lifetime=lifetime)
    return json_response(stored.to_openai())


@router.get(
    "/v1/files",
    openapi_extra=operation("listFiles", "List files", answers(FileList, job_examples.FILES), parameters=_PARAMETERS),
)
async def listed(request: Request) -> Response:
    """The files that are kept, newest first. The next page is `after` the `last_id` of this one."""
    batches, asked = batches_of(request), request.query_params
    check_names(request, ("limit", "after", "order", "purpose"))
    if asked.get("order", "desc") not in ("asc", "desc"):
        raise invalid("'order' must be asc or desc", param="order")
    page = await batches.files.page(
        tenant_of(request).name,
        purpose=asked.get("purpose"),
        after=asked.get("after"),
        limit=limit_of(request, default=MOST_LISTED, most=MOST_LISTED),
        newest_first=asked.get("order", "desc") == "desc",
    )
    return json_response(list_object([stored.to_openai() for stored in page.items], more=page.more))


@router.get(
    "/v1/files/{file_id}",
    openapi_extra=operation("getFile", "Look at a file", answers(FileObject, job_examples.FILE)),
)
async def look(request: Request, file_id: str) -> Response:
    """What is known of a file."""
    return json_response((await batches_of(request).files.get(tenant_of(request).name, file_id)).to_openai())


@router.get(
    "/v1/files/{file_id}/content",
    openapi_extra=operation(
        "getFileContent", "Read a file", {"responses": {"200": {"description": "the file's bytes"} | _CONTENT}}
    ),
)
async def content(request: Request, file_id: str) -> Response:
    """The file's bytes."""
    files = batches_of(request).files
    stored = await files.get(tenant_of(request).name, file_id)
    headers = {"content-length": str(stored.bytes), "x-content-type-options": "nosniff"}
    return StreamingResponse(files.content(stored), media_type="application/octet-stream", headers=headers)


@router.delete(
    "/v1/files/{file_id}",
    openapi_extra=operation("deleteFile", "Delete a file", answers(DeletedFile, job_examples.DELETED)),
)
async def delete(request: Request, file_id: str) -> Response:
    """Overwrite and remove a file. A batch that has read it goes on."""
    await batches_of(request).files.delete(tenant_of(request).name, file_id)
    return json_response({"id": file_id, "object": "file", "deleted": True})


def _check(form: FormData, lifetime: float) -> tuple[UploadFile, float]:
    unknown = next((name for name in form if name not in _FIELDS), None)
    if unknown is not None:
        raise UnknownField(f"unknown field '{unknown[:100]}'", unknown[:100])
    file = form.get("file")
    if not isinstance(file, UploadFile):
        raise invalid("'file' is required, as a file", param="file")
    if form.get("purpose") != "batch":
        raise invalid("'purpose' is required and must be batch", param="purpose")
    anchor, seconds = form.get(_ANCHOR), form.get(_SECONDS)
    if anchor is None and seconds is None:
        return file, lifetime
    if anchor != "created_at":
        raise invalid(f"'{_ANCHOR}' must be created_at", param=_ANCHOR)
    if not isinstance(seconds, str) or not (seconds.isascii() and seconds.isdigit() and len(seconds) < 9):
        raise invalid(f"'{_SECONDS}' must be a whole number", param=_SECONDS)
    if not MIN_LIFETIME <= int(seconds) <= MAX_LIFETIME:
        raise invalid(f"'{_SECONDS}' must be from {MIN_LIFETIME} to {MAX_LIFETIME}", param=_SECONDS)
    return file, float(seconds)
