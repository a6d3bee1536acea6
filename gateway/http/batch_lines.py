"""What answers the lines of batches: the very functions behind the routes, with their limits, budgets and errors."""

from __future__ import annotations

import re
from typing import Any

import structlog

from gateway.auth import Keyring, Tenant
from gateway.batches.lines import Line, Problem, Reply
from gateway.conversation import Caller
from gateway.core import Gateway
from gateway.http import chat_routes, moderation_routes, question_routes
from gateway.http.error_bodies import error_body, shape_of
from gateway.http.route import aside, validate
from gateway.json_text import LONG_STRINGS
from gateway.routing.retries import LATER
from gateway.schemas.batch_bodies import QUESTIONS_ENDPOINT
from gateway.schemas.chat_bodies import ChatRequest
from gateway.schemas.moderation_bodies import ModerationRequest
from gateway.schemas.question_bodies import QuestionsRequest
from lookonce.core.errors import ErrorKind, LookonceError, invalid

_QUESTIONS_URL = re.compile(r"/v1/images/([A-Za-z0-9_.-]{1,128})/questions")
log = structlog.get_logger(__name__)


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
