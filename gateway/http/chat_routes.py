"""/v1/chat/completions: OpenAI's request in, the core's turns out; and OpenAI's objects, whole and in chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from gateway.answers import Answering, Completion, finish_reason, receipt, usage
from gateway.auth import Tenant
from gateway.conversation import Caller, ImagePart, ToolCall, Turn
from gateway.core import Gateway
from gateway.http import examples
from gateway.http.event_stream import EventStream
from gateway.http.openapi import or_events
from gateway.http.request_images import RemoteImages, asked_bounds, check_images, keep_all
from gateway.http.route import Route, caller_of, gateway_of, json_response, until_disconnect
from gateway.images.encoder import Resolved
from gateway.schemas.body import stop_list, to_sampling
from gateway.schemas.requests import AnyMessage, AssistantMessage, ChatRequest, ImageUrlPart, StreamOptions, template_of
from gateway.schemas.responses import ChatCompletion, ChatCompletionChunk
from gateway.schemas.structure import structure_of
from gateway.schemas.tools import CalledTool, tools_of
from gateway.settings import GatewaySettings
from gateway.tool_calls import Piece, ToolCallReader, read_calls
from lookonce.core.errors import ErrorKind, LookonceError, invalid
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
    turns = await until_disconnect(request, turns_of(body, gateway, caller.tenant))
    sampling = sampling_of(body)
    answering = gateway.answers.generate(turns, sampling, caller, tools := tools_of(body), template_of(body))
    options = body.stream_options or StreamOptions()
    stream = chunks(answering, envelope_of(body, gateway, turns), max(1, sampling.n), options, calls=tools is not None)
    return EventStream(await until_disconnect(request, begun(stream)), heartbeat=gateway.settings.heartbeat)


async def complete(body: ChatRequest, gateway: Gateway, caller: Caller) -> dict[str, Any]:
    """The whole completion object. Raises what is wrong with the request, naming the field."""
    turns = await turns_of(body, gateway, caller.tenant)
    envelope = envelope_of(body, gateway, turns)
    tools = tools_of(body)
    completions, resolved = await gateway.answers.complete(turns, sampling_of(body), caller, tools, template_of(body))
    logprobs = bool(body.logprobs)
    return completion_object(completions, resolved, envelope, with_logprobs=logprobs, calls=tools is not None)


def envelope_of(body: ChatRequest, gateway: Gateway, turns: Sequence[Turn] = ()) -> Envelope:
    """That of a chat's answer; `turns` are those that the model is shown."""
    served = gateway.model.name
    name, text_first = body.model or served, _is_text_first(turns)
    return Envelope("chatcmpl-" + uuid.uuid4().hex, int(time.time()), name, served, text_first=text_first)


async def begun(stream: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[dict[str, Any], None]:
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
        for place, part in enumerate(message.content or ())
        if isinstance(part, ImageUrlPart)
    }


def _param(number: int, place: int, part: ImageUrlPart) -> str:
    return f"messages.{number}.content.{place}.{part.field}"


def _chars(body: ChatRequest) -> int:
    texts = sum(
        len(message.content)
        if isinstance(message.content, str)
        else sum(0 if isinstance(part, ImageUrlPart) else len(part.text) for part in message.content or ())
        for message in body.messages
    )
    called = (call.function.arguments for message in body.messages for call in _calls(message))
    return texts + sum(map(len, called))


def _calls(message: AnyMessage) -> Sequence[CalledTool]:
    return (message.tool_calls or ()) if isinstance(message, AssistantMessage) else ()


async def turns_of(body: ChatRequest, gateway: Gateway, tenant: Tenant) -> tuple[Turn, ...]:
    """Check the request, then fetch and keep its images."""
    remote = _check(body, gateway.settings)
    await gateway.model.check(body.model)
    bounds = asked_bounds(body.mm_processor_kwargs, "mm_processor_kwargs.")
    files = await remote.fetch(gateway.fetcher, tenant)
    kept = await keep_all(_images(body), files, gateway, tenant, bounds=bounds)
    turns = []
    for number, message in enumerate(body.messages):
        role = "system" if message.role == "developer" else message.role
        calls = tuple(ToolCall(call.id, call.function.name, call.function.arguments) for call in _calls(message))
        if isinstance(message.content, str):
            turns.append(Turn(role, (message.content,), calls))
            continue
        parts = (
            kept[_param(number, place, part)] if isinstance(part, ImageUrlPart) else part.text
            for place, part in enumerate(message.content or ())
        )
        turns.append(Turn(role, tuple(parts), calls))
    wanted = gateway.settings.image_first if body.image_first is None else body.image_first
    return tuple(map(_image_first, turns)) if wanted and _users(turns) == 1 else tuple(turns)


def _users(turns: Sequence[Turn]) -> int:
    return sum(turn.role == "user" for turn in turns)


def _image_first(turn: Turn) -> Turn:
    """The turn with its images before its text."""
    if turn.role != "user":
        return turn
    return replace(turn, parts=tuple(sorted(turn.parts, key=lambda part: not isinstance(part, ImagePart))))


def _is_text_first(turns: Sequence[Turn]) -> bool:
    """Whether a question stands before the only user's image, whose KV no other question can then share."""
    parts = next((turn.parts for turn in turns if turn.role == "user"), ())
    images = [place for place, part in enumerate(parts) if isinstance(part, ImagePart)]
    return _users(turns) == 1 and bool(images) and images[0] > 0


def sampling_of(body: ChatRequest) -> language_pb2.SamplingParameters:
    return to_sampling(
        body,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        stop=stop_list(body.stop),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        n=body.n or 1,
        structure=structure_of(body),
    )


@dataclass(frozen=True)
class Envelope:
    """What all chunks of an answer have in common."""

    id: str
    created: int  # Unix seconds
    model: str  # as the request names it: some clients compare
    served: str  # as the receipt names it
    text_first: bool = False  # as the receipt tells

    def receipt(self, resolved: Sequence[Resolved], cost: language_pb2.LanguageReceipt) -> dict[str, Any]:
        """That of the answer."""
        bill = receipt(resolved, cost, self.served)
        return bill | {"text_first": True} if self.text_first else bill

    def wrap(self, kind: str, **fields: Any) -> dict[str, Any]:
        """The object of that kind with these fields."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, **fields}


def completion_object(
    completions: Sequence[Completion],
    resolved: Sequence[Resolved],
    envelope: Envelope,
    *,
    with_logprobs: bool,
    calls: bool = False,
) -> dict[str, Any]:
    """The answer as one JSON; `calls`: there may be some in its text."""
    choices = []
    for index, completion in enumerate(completions):
        message: dict[str, Any] = {"role": "assistant", "content": completion.text, "refusal": None}
        reason = finish_reason(completion.finish.reason)
        if calls:
            text, found = read_calls(completion.text)
            message["content"] = text or None
            message |= {"tool_calls": [call.as_json() for call in found]} if found else {}
            reason = "tool_calls" if found and reason == "stop" else reason
        logprobs = _logprobs(completion.logprobs) if with_logprobs else None
        choices.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason})
    bill = envelope.receipt(resolved, completions[0].finish.receipt)
    return envelope.wrap(
        "chat.completion",
        choices=choices,
        usage=usage([completion.finish.usage for completion in completions]),
        system_fingerprint=f"fp_{bill['fingerprint'][:16]}" if bill["fingerprint"] else None,
        receipt=bill,
    )


class _Running:
    """The tokens of a stream so far."""

    def __init__(self) -> None:
        self._prompt = 0
        self._completion: dict[int, int] = {}  # of each of the n answers

    def begin(self, event: language_pb2.GenerateEvent) -> None:
        """Learn the prompt's tokens, which every event tells."""
        is_delta = event.WhichOneof("event") == "delta"
        self._prompt = event.delta.prompt_tokens if is_delta else event.finish.usage.prompt_tokens

    def count(self, event: language_pb2.GenerateEvent) -> None:
        """Count the answer's tokens that an event brings."""
        if event.WhichOneof("event") == "delta":
            index = event.delta.index
            self._completion[index] = self._completion.get(index, 0) + len(event.delta.token_ids)
        else:
            self._completion[event.finish.index] = event.finish.usage.completion_tokens

    def usage(self) -> dict[str, int]:
        """OpenAI's usage object, without what only the end tells."""
        completion = sum(self._completion.values())
        total = self._prompt + completion
        return {"prompt_tokens": self._prompt, "completion_tokens": completion, "total_tokens": total}


async def chunks(
    answering: Answering, envelope: Envelope, n: int, options: StreamOptions, *, calls: bool = False
) -> AsyncGenerator[dict[str, Any], None]:
    """The answer in chunks: roles, deltas, finish reasons; the receipt and, when asked for, the usage in the last.
    `calls`: there may be some in its text."""
    readers = [ToolCallReader() for _ in range(n)] if calls else []
    finishes: list[language_pb2.Finish] = []
    greeted: set[int] = set()
    running = _Running()

    def extra() -> dict[str, Any]:
        if options.continuous_usage_stats:
            return {"usage": running.usage()}
        return {"usage": None} if options.include_usage else {}

    async with aclosing(answering.events) as events:
        async for event in events:
            which = event.WhichOneof("event")
            index = event.delta.index if which == "delta" else event.finish.index
            running.begin(event)
            if index not in greeted:
                greeted.add(index)
                yield _chunk(envelope, index, {"role": "assistant", "content": ""}, extra())
            running.count(event)
            reader = readers[index] if calls else None
            if which == "delta":
                if event.delta.text or event.delta.logprobs:
                    logprobs = _logprobs(event.delta.logprobs) if event.delta.logprobs else None
                    for delta in _deltas(event.delta.text, reader):
                        yield _chunk(envelope, index, delta, extra(), logprobs=logprobs)
                        logprobs = None
                continue
            for piece in reader.push("", last=True) if reader is not None else ():
                yield _chunk(envelope, index, _delta(piece), extra())
            finishes.append(event.finish)
            last = len(finishes) == n
            bill = envelope.receipt(answering.resolved, event.finish.receipt) if last else None
            fields = extra() | ({"receipt": bill} if last and not options.include_usage else {})
            reason = finish_reason(event.finish.reason)
            if reader is not None and reader.calls and reason == "stop":
                reason = "tool_calls"
            yield _chunk(envelope, index, {}, fields, reason=reason)
            if last:
                total = usage([finish.usage for finish in finishes])
                if options.include_usage:
                    yield envelope.wrap("chat.completion.chunk", choices=[], usage=total, receipt=bill)
    if len(finishes) < n:
        raise LookonceError(ErrorKind.UNAVAILABLE, "the language service ended the answer early", retry_after=1.0)


def _deltas(text: str, reader: ToolCallReader | None) -> Iterator[dict[str, Any]]:
    if reader is None:
        yield {"content": text}
    else:
        yield from map(_delta, reader.push(text))


def _delta(piece: Piece) -> dict[str, Any]:
    """OpenAI's: a call's name comes with its first chunk alone."""
    if piece.call is None:
        return {"content": piece.text}
    function = {"name": piece.call.name, "arguments": piece.text} if piece.begins else {"arguments": piece.text}
    told = {"id": piece.call.id, "type": "function"} if piece.begins else {}
    return {"tool_calls": [{"index": piece.call.number, **told, "function": function}]}


def _chunk(
    envelope: Envelope,
    index: int,
    delta: dict[str, Any],
    extra: dict[str, Any],
    *,
    logprobs: dict[str, Any] | None = None,
    reason: str | None = None,
) -> dict[str, Any]:
    choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
    return envelope.wrap("chat.completion.chunk", choices=[choice], **extra)


def _logprobs(items: Iterable[language_pb2.TokenLogprob]) -> dict[str, Any]:
    content = [_token(item) | {"top_logprobs": [_token(top) for top in item.top]} for item in items]
    return {"content": content, "refusal": None}


def _token(item: language_pb2.TokenLogprob) -> dict[str, Any]:
    return {"token": item.token, "logprob": item.logprob, "bytes": list(item.token_bytes)}
