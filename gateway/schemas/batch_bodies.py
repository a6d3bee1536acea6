"""OpenAI's files and batches: the request, and what the API answers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from gateway.schemas.body import Body
from gateway.schemas.responses import Answered, Listed

MIN_LIFETIME = 3600
MAX_LIFETIME = 2_592_000
QUESTIONS_ENDPOINT = "/v1/images/{id}/questions"
Endpoint = Literal["/v1/chat/completions", "/v1/moderations", "/v1/images/{id}/questions"]
Status = Literal["validating", "in_progress", "cancelling", "completed", "failed", "expired", "cancelled"]
Metadata = Annotated[dict[str, Annotated[str, Field(max_length=512)]], Field(max_length=16)]
Time = Annotated[int | None, Field(description="Unix seconds")]


class ExpiresAfter(Body):
    """How long output files are kept."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=MIN_LIFETIME, le=MAX_LIFETIME)]


class BatchRequest(Body):
    """POST /v1/batches. `endpoint` is what the `url` of every line must be; for questions with an image id in it."""

    input_file_id: Annotated[str, Field(min_length=1, max_length=128)]
    endpoint: Endpoint
    completion_window: Literal["24h"]
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None


class FileObject(Answered):
    """A file that is kept."""

    id: str
    object: Literal["file"]
    bytes: int = Field(ge=0)
    created_at: int = Field(description="Unix seconds")
    expires_at: Time
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"]
    status_details: None = None


class FileList(Listed[FileObject]):
    """A page of files."""


class DeletedFile(Answered):
    """A file that is gone."""

    id: str
    object: Literal["file"]
    deleted: Literal[True]


class BatchError(Answered):
    """Why a batch failed before it began."""

    code: str
    message: str
    line: int | None = Field(description="line of the input file, from 1")
    param: str | None


class BatchErrors(Answered):
    """All of them, at most 100."""

    object: Literal["list"]
    data: list[BatchError]


class RequestCounts(Answered):
    """How far a batch is."""

    total: int = Field(ge=0)
    completed: int = Field(ge=0)
    failed: int = Field(ge=0)


class InputDetails(Answered):
    """Of the tokens of all prompts."""

    cached_tokens: int = Field(ge=0, description="those whose KV was reused")


class OutputDetails(Answered):
    """Of the tokens of all answers."""

    reasoning_tokens: Literal[0]


class BatchUsage(Answered):
    """Tokens of all lines answered so far."""

    input_tokens: int = Field(ge=0)
    input_tokens_details: InputDetails
    output_tokens: int = Field(ge=0)
    output_tokens_details: OutputDetails
    total_tokens: int = Field(ge=0)


class BatchObject(Answered):
    """A batch."""

    id: str
    object: Literal["batch"]
    endpoint: Endpoint
    status: Status
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    output_file_id: str | None
    error_file_id: str | None
    created_at: int = Field(description="Unix seconds")
    expires_at: Time
    in_progress_at: Time
    finalizing_at: Time
    completed_at: Time
    failed_at: Time
    expired_at: Time
    cancelling_at: Time
    cancelled_at: Time
    request_counts: RequestCounts
    metadata: dict[str, str] | None
    usage: BatchUsage | None = Field(None, description="null until a line is answered")


class BatchList(Listed[BatchObject]):
    """A page of batches, newest first."""
