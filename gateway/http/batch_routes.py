"""/v1/batches: many requests worked on in the background, as in OpenAI's API."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from gateway.http import job_examples
from gateway.http.field_errors import read_json
from gateway.http.file_routes import batches_of
from gateway.http.openapi import answers, json_body, operation, query
from gateway.http.pages import check_names, limit_of, list_object
from gateway.http.route import gateway_of, json_response, tenant_of
from gateway.schemas.batch_bodies import BatchList, BatchObject, BatchRequest

router = APIRouter(tags=["batches"])
DEFAULT_PAGE = 20
MAX_PAGE = 100
_PARAMETERS = [
    query("limit", "most batches in the answer", {"type": "integer", "minimum": 1, "maximum": MAX_PAGE}),
    query("after", "the id of the last batch seen", {"type": "string"}),
]


@router.post(
    "/v1/batches",
    openapi_extra=operation(
        "createBatch",
        "Begin a batch",
        json_body(BatchRequest, job_examples.BATCHES),
        answers(BatchObject, job_examples.BATCH),
    ),
)
async def create(request: Request) -> Response:
    """Have every line of an uploaded file answered. Lines are {"custom_id", "method": "POST", "url", "body"}; pictures
    may be data: URLs, https: URLs or "lookonce:IMAGE_ID". Errors of a line end up in the error file."""
    batches, settings = batches_of(request), gateway_of(request).settings
    body = await read_json(request, BatchRequest)
    kept = body.output_expires_after
    job = await batches.jobs.create(
        tenant_of(request).name,
        endpoint=body.endpoint,
        input_file=body.input_file_id,
        metadata=body.metadata,
        lifetime=settings.batch_window,
        output_lifetime=kept.seconds if kept is not None else settings.file_ttl,
    )
    batches.wake()
    return json_response(job.to_openai())


@router.get(
    "/v1/batches",
    openapi_extra=operation(
        "listBatches", "List batches", answers(BatchList, job_examples.BATCH_LIST), parameters=_PARAMETERS
    ),
)
async def listed(request: Request) -> Response:
    """All batches, newest first. The next page is `after` the `last_id` of this one."""
    batches = batches_of(request)
    check_names(request, ("limit", "after"))
    page = await batches.jobs.page(
        tenant_of(request).name,
        after=request.query_params.get("after"),
        limit=limit_of(request, default=DEFAULT_PAGE, most=MAX_PAGE),
    )
    return json_response(list_object([job.to_openai() for job in page.items], more=page.more))


@router.get(
    "/v1/batches/{batch_id}",
    openapi_extra=operation("getBatch", "Look at a batch", answers(BatchObject, job_examples.BATCH)),
)
async def look(request: Request, batch_id: str) -> Response:
    """How far a batch is, and where its results are."""
    return json_response((await batches_of(request).jobs.get(tenant_of(request).name, batch_id)).to_openai())


@router.post(
    "/v1/batches/{batch_id}/cancel",
    openapi_extra=operation("cancelBatch", "Cancel a batch", answers(BatchObject, job_examples.BATCH), errors=(409,)),
)
async def cancel(request: Request, batch_id: str) -> Response:
    """Begin no more lines and stop those under way. What was answered is in the output file."""
    batches = batches_of(request)
    job = await batches.jobs.cancel(tenant_of(request).name, batch_id)
    batches.cancel(job.id)
    return json_response(job.to_openai())
