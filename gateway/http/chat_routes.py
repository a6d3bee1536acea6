"""/v1/chat/completions: OpenAI's request in, the core's turns out."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from gateway.auth import Tenant
from gateway.conversation import Caller, Turn
from gateway.core import Gateway
from gateway.http import examples
from gateway.http.chat_shapes import Envelope, chunks, completion_object
from gateway.http.event_stream import EventStream, until_disconnect
from gateway.http.openapi import or_events
from gateway.http.request_images import RemoteImages, check_images, keep_all
from gateway.http.route import Route, caller_of, gateway_of, json_response
from gateway.schemas.chat_bodies import ChatRequest, ImageUrlPart, StreamOptions
from gateway.schemas.responses import ChatCompletion, ChatCompletionChunk
from gateway.schemas.sampling_fields import stop_list, to_sampling
from gateway.settings import GatewaySettings
from lookonce.core.errors import invalid
from protos.lookonce.v1 import language_pb2

router = APIRouter(tags=["chat"], route_class=Route)


@router.post(
    "/v1/chat/completions",
    summary="Answer a conversation",
    response_model=ChatCompletion,
    responses=or_events(ChatCompletionChunk, *examples.CHUNKS),
)
async def create_chat_completion(request: Request, body: ChatRequest) -> Response:
    """Answer a conversation of text and images, as OpenAI's API does; with a receipt."""
    gateway = gateway_of(request)
    caller = caller_of(request, body.user or body.safety_identifier)
    if not body.stream:
        return json_response(await until_disconnect(request, complete(body, gateway, caller)))
    turns = await until_disconnect(request, _turns(body, gateway, caller.tenant))
    sampling = _sampling(body)
    answering = gateway.answers.generate(turns, sampling, caller)
    options = body.stream_options or StreamOptions()
    stream = chunks(answering, _envelope(body, gateway), max(1, sampling.n), options)
    return EventStream(await until_disconnect(request, _begun(stream)), heartbeat=gateway.settings.heartbeat)


async def complete(body: ChatRequest, gateway: Gateway, caller: Caller) -> dict[str, Any]:
    """The whole completion object. Raises what is wrong with the request, naming the field."""
    turns = await _turns(body, gateway, caller.tenant)
    envelope = _envelope(body, gateway)
    completions, resolved = await gateway.answers.complete(turns, _sampling(body), caller)
    return completion_object(completions, resolved, envelope, with_logprobs=bool(body.logprobs))


def _envelope(body: ChatRequest, gateway: Gateway) -> Envelope:
    served = gateway.model.name
    return Envelope("chatcmpl-" + uuid.uuid4().hex, int(time.time()), body.model or served, served)


async def _begun(stream: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[dict[str, Any], None]:
    """The same stream, its first item ready: what fails before it still gets its HTTP status."""
    first = await anext(stream)

    async def again() -> AsyncGenerator[dict[str, Any], None]:
        try:
            yield first
            async for item in stream:
                yield item
        finally:
            await stream.aclose()

    return again()


def _check(body: ChatRequest, settings: GatewaySettings) -> RemoteImages:
    if body.top_logprobs and not body.logprobs:
        raise invalid("'top_logprobs' needs 'logprobs': true", param="top_logprobs")
    if body.stream_options is not None and not body.stream:
        raise invalid("'stream_options' needs 'stream': true", param="stream_options")
    if len({body.max_tokens, body.max_completion_tokens} - {None}) > 1:
        raise invalid("'max_tokens' and 'max_completion_tokens' differ: give one of them", param="max_tokens")
    if (body.n or 1) > settings.max_n:
        raise invalid(f"'n' is {body.n}, the limit is {settings.max_n}", param="n")
    chars = _chars(body)
    if chars > settings.max_text_chars:
        raise invalid(f"the text has {chars} characters, the limit is {settings.max_text_chars}", param="messages")
    return check_images([(name, part.url) for name, part in _images(body).items()], settings, "messages")


def _images(body: ChatRequest) -> dict[str, ImageUrlPart]:
    """The images by the fields that they are in, in order."""
    return {
        _param(number, place, part): part
        for number, message in enumerate(body.messages)
        if not isinstance(message.content, str)
        for place, part in enumerate(message.content)
        if isinstance(part, ImageUrlPart)
    }


def _param(number: int, place: int, part: ImageUrlPart) -> str:
    return f"messages.{number}.content.{place}.{part.field}"


def _chars(body: ChatRequest) -> int:
    return sum(
        len(message.content)
        if isinstance(message.content, str)
        else sum(0 if isinstance(part, ImageUrlPart) else len(part.text) for part in message.content)
        for message in body.messages
    )


async def _turns(body: ChatRequest, gateway: Gateway, tenant: Tenant) -> tuple[Turn, ...]:
    """Check the request, then fetch and keep its images."""
    remote = _check(body, gateway.settings)
    await gateway.model.check(body.model)
    kept = await keep_all(_images(body), await remote.fetch(gateway.fetcher, tenant), gateway, tenant)
    turns = []
    for number, message in enumerate(body.messages):
        role = "system" if message.role == "developer" else message.role
        if isinstance(message.content, str):
            turns.append(Turn(role, (message.content,)))
            continue
        parts = (
            kept[_param(number, place, part)] if isinstance(part, ImageUrlPart) else part.text
            for place, part in enumerate(message.content)
        )
        turns.append(Turn(role, tuple(parts)))
    return tuple(turns)


def _sampling(body: ChatRequest) -> language_pb2.SamplingParameters:
    return to_sampling(
        body,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        stop=stop_list(body.stop),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        n=body.n or 1,
    )
