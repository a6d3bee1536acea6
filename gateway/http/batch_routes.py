"""/v1/files and /v1/batches, as in OpenAI's API: many requests worked on in the background, and what they are read
from and written to. The very functions behind the routes answer lines, with their limits, budgets and errors."""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, Literal

import structlog
from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import SkipJsonSchema
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from gateway.auth import Keyring, Tenant
from gateway.batches.lines import Line, Problem, Reply
from gateway.batches.worker import Batches
from gateway.conversation import Caller
from gateway.core import Gateway
from gateway.http import chat_routes, moderation_routes, question_routes
from gateway.http.error_bodies import error_body, shape_of
from gateway.http.openapi import upload_body
from gateway.http.route import (
    Route,
    UnknownField,
    aside,
    gateway_of,
    json_response,
    list_object,
    tenant_of,
    validate,
    whole,
)
from gateway.json_text import LONG_STRINGS
from gateway.routing.retries import LATER
from gateway.schemas.batch_bodies import (
    MAX_LIFETIME,
    MIN_LIFETIME,
    QUESTIONS_ENDPOINT,
    BatchList,
    BatchObject,
    BatchRequest,
    DeletedFile,
    FileList,
    FileObject,
)
from gateway.schemas.requests import ChatRequest, ModerationRequest, QuestionsRequest
from gateway.schemas.responses import ErrorBody
from lookonce.core.errors import ErrorKind, LookonceError, invalid
from lookonce.core.units import format_size

MOST_FILES, MOST_BATCHES = 10_000, 100
MAX_FILENAME = 255
_ANCHOR, _SECONDS = "expires_after[anchor]", "expires_after[seconds]"
_FIELDS: dict[str, Any] = {
    "purpose": {"type": "string", "enum": ["batch"]},
    _ANCHOR: {"type": "string", "enum": ["created_at"]},
    _SECONDS: {"type": "integer", "minimum": MIN_LIFETIME, "maximum": MAX_LIFETIME},
}
_CONTENT = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_UNSHOWN = re.compile(r"[\x00-\x1f\x7f]")
_QUESTIONS_URL = re.compile(r"/v1/images/([A-Za-z0-9_.-]{1,128})/questions")
log = structlog.get_logger(__name__)


async def _stored(request: Request) -> Batches:
    """Files and batches. Raises UNSUPPORTED without a data directory."""
    stored = gateway_of(request).batches
    if stored is None:
        text = "this server keeps no files: start the gateway with --data-dir DIR or LOOKONCE_GATEWAY_DATA_DIR"
        raise LookonceError(ErrorKind.UNSUPPORTED, text)
    return stored


async def _owner(request: Request) -> str:
    return tenant_of(request).name


class _StoredRoute(Route):
    """A route that is refused before its body is read where no files are kept."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def check_first(request: Request) -> Response:
            await _stored(request)
            return await handle(request)

        return check_first


files = APIRouter(tags=["files"], route_class=_StoredRoute)
batches = APIRouter(tags=["batches"], route_class=_StoredRoute)
Stored = Annotated[Batches, Depends(_stored)]
Owner = Annotated[str, Depends(_owner)]


class FilesQuery(BaseModel):
    """Which files are listed."""

    model_config = ConfigDict(extra="forbid")

    limit: Annotated[int, Query(ge=1, le=MOST_FILES, description="most files in the answer"), whole(MOST_FILES)] = (
        MOST_FILES
    )
    after: Annotated[str | SkipJsonSchema[None], Query(description="the id of the last file seen")] = None
    order: Annotated[Literal["asc", "desc"], Query(description="by age")] = "desc"
    purpose: Annotated[str | SkipJsonSchema[None], Query(description="only files of this purpose")] = None


class BatchesQuery(BaseModel):
    """Which batches are listed."""

    model_config = ConfigDict(extra="forbid")

    limit: Annotated[
        int, Query(ge=1, le=MOST_BATCHES, description="most batches in the answer"), whole(MOST_BATCHES)
    ] = 20
    after: Annotated[str | SkipJsonSchema[None], Query(description="the id of the last batch seen")] = None


@files.post(
    "/v1/files", summary="Upload a file", response_model=FileObject, openapi_extra=upload_body(_FIELDS, "purpose")
)
async def create_file(request: Request, stored: Stored, owner: Owner) -> dict[str, Any]:
    """Keep a JSONL file of requests for a batch. `purpose` is "batch"."""
    settings = gateway_of(request).settings
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise invalid("send multipart/form-data with the fields 'file' and 'purpose'", param="content-type")
    async with request.form(max_files=1, max_fields=len(_FIELDS), max_part_size=1024) as form:
        file, lifetime = _check(form, settings.file_ttl)
        size = file.size or 0
        if size > settings.max_file_bytes:
            limit = format_size(settings.max_file_bytes)
            raise invalid(f"'file' has {format_size(size)}, the limit is {limit}", param="file")
        if size == 0:
            raise invalid("'file' is empty", param="file")
        name = _UNSHOWN.sub("", file.filename or "")[:MAX_FILENAME] or "file"
        return (await stored.files.add(owner, name, file.file, lifetime=lifetime)).to_openai()


@files.get("/v1/files", summary="List files", response_model=FileList)
async def list_files(query: Annotated[FilesQuery, Query()], stored: Stored, owner: Owner) -> Response:
    """The files that are kept, newest first. The next page is `after` the `last_id` of this one."""
    page = await stored.files.page(
        owner, purpose=query.purpose, after=query.after, limit=query.limit, newest_first=query.order == "desc"
    )
    return json_response(list_object([file.to_openai() for file in page.items], more=page.more))


@files.get("/v1/files/{file_id}", summary="Look at a file", response_model=FileObject)
async def get_file(file_id: str, stored: Stored, owner: Owner) -> dict[str, Any]:
    """What is known of a file."""
    return (await stored.files.get(owner, file_id)).to_openai()


@files.get(
    "/v1/files/{file_id}/content",
    summary="Read a file",
    response_class=StreamingResponse,
    responses={200: {"description": "the file's bytes", "content": _CONTENT}},
)
async def get_file_content(file_id: str, stored: Stored, owner: Owner) -> Response:
    """The file's bytes."""
    file = await stored.files.get(owner, file_id)
    headers = {"content-length": str(file.bytes), "x-content-type-options": "nosniff"}
    return StreamingResponse(stored.files.content(file), media_type="application/octet-stream", headers=headers)


@files.delete("/v1/files/{file_id}", summary="Delete a file", response_model=DeletedFile)
async def delete_file(file_id: str, stored: Stored, owner: Owner) -> dict[str, Any]:
    """Overwrite and remove a file. A batch that has read it goes on."""
    await stored.files.delete(owner, file_id)
    return {"id": file_id, "object": "file", "deleted": True}


@batches.post("/v1/batches", summary="Begin a batch", response_model=BatchObject)
async def create_batch(request: Request, body: BatchRequest, stored: Stored, owner: Owner) -> dict[str, Any]:
    """Have every line of an uploaded file answered. Lines are {"custom_id", "method": "POST", "url", "body"}; images
    may be data: URLs, https: URLs or "lookonce:IMAGE_ID". Errors of a line end up in the error file."""
    settings, kept = gateway_of(request).settings, body.output_expires_after
    job = await stored.jobs.create(
        owner,
        endpoint=body.endpoint,
        input_file=body.input_file_id,
        metadata=body.metadata,
        lifetime=settings.batch_window,
        output_lifetime=kept.seconds if kept is not None else settings.file_ttl,
    )
    stored.wake()
    return job.to_openai()


@batches.get("/v1/batches", summary="List batches", response_model=BatchList)
async def list_batches(query: Annotated[BatchesQuery, Query()], stored: Stored, owner: Owner) -> dict[str, Any]:
    """All batches, newest first. The next page is `after` the `last_id` of this one."""
    page = await stored.jobs.page(owner, after=query.after, limit=query.limit)
    return list_object([job.to_openai() for job in page.items], more=page.more)


@batches.get("/v1/batches/{batch_id}", summary="Look at a batch", response_model=BatchObject)
async def get_batch(batch_id: str, stored: Stored, owner: Owner) -> dict[str, Any]:
    """How far a batch is, and where its results are."""
    return (await stored.jobs.get(owner, batch_id)).to_openai()


@batches.post(
    "/v1/batches/{batch_id}/cancel",
    summary="Cancel a batch",
    response_model=BatchObject,
    responses={409: {"model": ErrorBody}},
)
async def cancel_batch(batch_id: str, stored: Stored, owner: Owner) -> dict[str, Any]:
    """Begin no more lines and stop those under way. What was answered is in the output file."""
    job = await stored.jobs.cancel(owner, batch_id)
    stored.cancel(job.id)
    return job.to_openai()


def _check(form: FormData, lifetime: float) -> tuple[UploadFile, float]:
    unknown = next((name for name in form if name != "file" and name not in _FIELDS), None)
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


class BatchEndpoints:
    """Implements `gateway.batches.worker.Endpoints`."""

    def __init__(self, gateway: Gateway, keyring: Keyring) -> None:
        self._gateway = gateway
        self._keyring = keyring

    def check(self, line: Line, endpoint: str) -> Problem | None:
        """Whether the line's URL is the batch's endpoint."""
        if endpoint == QUESTIONS_ENDPOINT:
            fits = _QUESTIONS_URL.fullmatch(line.url) is not None
        else:
            fits = line.url == endpoint
        text = f"'url' must be {endpoint}"
        return None if fits else Problem("mismatched_endpoint", text, line.number, "url", line.custom_id)

    async def answer(self, line: Line, tenant: str, *, last: bool) -> Reply:
        """The answer. Raises OVERLOADED, RATE_LIMITED and UNAVAILABLE unless this is the last try."""
        known = self._keyring.tenant(tenant)
        if known is None:
            return _failure(LookonceError(ErrorKind.UNAUTHENTICATED, "the batch's owner has no API key any more"))
        try:
            return Reply(200, await self._answer(line, known))
        except LookonceError as error:
            if error.kind in LATER and not last:
                raise
            return _failure(error)
        except Exception:
            log.exception("a batch line failed", line=line.number)
            return _failure(LookonceError(ErrorKind.INTERNAL, "internal error"))

    async def _answer(self, line: Line, tenant: Tenant) -> dict[str, Any]:
        LONG_STRINGS.set(line.long)
        timeout = self._gateway.settings.request_timeout
        caller = Caller(tenant, f"{tenant.name}/batch", timeout, background=True)
        if line.url == "/v1/chat/completions":
            chat_request = await aside(line.size, validate, line.body, ChatRequest)
            _no_stream(chat_request.stream)
            return await chat_routes.complete(chat_request, self._gateway, caller)
        if line.url == "/v1/moderations":
            return await moderation_routes.moderate(
                await aside(line.size, validate, line.body, ModerationRequest), self._gateway, caller
            )
        found = _QUESTIONS_URL.fullmatch(line.url)
        if found is None:
            raise LookonceError(ErrorKind.NOT_FOUND, "no such route", param="url")
        record = await self._gateway.images.get(found[1], tenant)
        questions_request = await aside(line.size, validate, line.body, QuestionsRequest)
        _no_stream(questions_request.stream)
        return await question_routes.answer_all(record, questions_request, self._gateway, caller)


def _no_stream(stream: bool | None) -> None:
    if stream:
        raise invalid("'stream' must be false in a batch", param="stream")


def _failure(error: LookonceError) -> Reply:
    return Reply(shape_of(error).status, error_body(error))
