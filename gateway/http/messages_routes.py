"""/v1/messages: Anthropic's form of a conversation, over the same core as chats."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from gateway.answers import Answering, receipt
from gateway.conversation import Caller
from gateway.core import Gateway
from gateway.http import examples
from gateway.http.chat_routes import begun, chunks, envelope_of, sampling_of, turns_of
from gateway.http.event_stream import NamedEventStream
from gateway.http.openapi import or_events
from gateway.http.route import Route, caller_of, gateway_of, json_response, until_disconnect, validate
from gateway.schemas.messages_api import MessagesRequest, chat_of
from gateway.schemas.requests import ChatRequest, StreamOptions
from gateway.schemas.responses import MessageEvent, MessageObject
from gateway.schemas.tools import tools_of
from gateway.tool_calls import read_calls
from protos.lookonce.v1 import language_pb2

router = APIRouter(tags=["messages"], route_class=Route)


@router.post(
    "/v1/messages",
    summary="Answer a conversation, as Anthropic's API does",
    response_model=MessageObject,
    responses=or_events(MessageEvent, *examples.MESSAGE_EVENTS, named=True),
)
async def create_message(request: Request, body: MessagesRequest) -> Response:
    """Answer a conversation of text and images as Anthropic's Messages API does; with a receipt."""
    gateway = gateway_of(request)
    caller = caller_of(request, body.metadata.user_id if body.metadata is not None else None)
    chat = validate(chat_of(body), ChatRequest)
    name = body.model or gateway.model.name
    if not body.stream:
        return json_response(await until_disconnect(request, _complete(chat, gateway, caller, name)))
    turns = await until_disconnect(request, turns_of(chat, gateway, caller.tenant))
    answering = gateway.answers.generate(turns, sampling_of(chat), caller, tools_of(chat))
    stream = await until_disconnect(request, begun(_events(chat, answering, gateway, name)))
    return NamedEventStream(stream, heartbeat=gateway.settings.heartbeat)


def _message(name: str, **more: Any) -> dict[str, Any]:
    identifier = f"msg_{uuid.uuid4().hex}"
    fields = {"id": identifier, "type": "message", "role": "assistant", "model": name, "content": []}
    return {**fields, "stop_reason": None, "stop_sequence": None, **more}


def _usage(prompt: int, cached: int, completion: int) -> dict[str, int]:
    """Anthropic's: input without what was read from a cache."""
    told = {"input_tokens": prompt - cached, "output_tokens": completion}
    return {**told, "cache_creation_input_tokens": 0, "cache_read_input_tokens": cached}


def _reason(finish: str, stop: str) -> str:
    if stop:
        return "stop_sequence"
    return {"length": "max_tokens", "tool_calls": "tool_use"}.get(finish, "end_turn")


async def _complete(chat: ChatRequest, gateway: Gateway, caller: Caller, name: str) -> dict[str, Any]:
    tools = tools_of(chat)
    turns = await turns_of(chat, gateway, caller.tenant)
    (completion,), resolved = await gateway.answers.complete(turns, sampling_of(chat), caller, tools)
    finish = completion.finish
    text, calls = read_calls(completion.text) if tools is not None else (completion.text, [])
    content: list[dict[str, Any]] = [{"type": "text", "text": text, "citations": None}] if text or not calls else []
    content += [
        {"type": "tool_use", "id": call.id, "name": call.name, "input": _input(call.arguments)} for call in calls
    ]
    is_cut = finish.reason == language_pb2.LENGTH
    reason = _reason("length" if is_cut else "tool_calls" if calls else "stop", finish.stop)
    spent = _usage(finish.usage.prompt_tokens, finish.usage.cached_tokens, finish.usage.completion_tokens)
    told = {"stop_reason": reason, "stop_sequence": finish.stop or None, "usage": spent}
    return _message(name, content=content, **told, receipt=receipt(resolved, finish.receipt, gateway.model.name))


def _input(arguments: str) -> Any:
    """What a call's arguments say; nothing of those that the answer's length cut."""
    try:
        return orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return {}


class _Blocks:
    """The blocks of a streamed answer, from the pieces of a chat's."""

    def __init__(self) -> None:
        self._number = -1
        self._open = ""

    def take(self, delta: dict[str, Any]) -> list[dict[str, Any]]:
        """The events of a chunk."""
        found: list[dict[str, Any]] = []
        if delta.get("content"):
            if self._open != "text":
                found += [*self.end(), self._begin("text", {"type": "text", "text": ""})]
            found.append(self._delta({"type": "text_delta", "text": delta["content"]}))
        for part in delta.get("tool_calls", ()):
            if "id" in part:
                block = {"type": "tool_use", "id": part["id"], "name": part["function"]["name"], "input": {}}
                found += [*self.end(), self._begin("tool_use", block)]
            if part["function"]["arguments"]:
                found.append(self._delta({"type": "input_json_delta", "partial_json": part["function"]["arguments"]}))
        return found

    def end(self) -> list[dict[str, Any]]:
        """The event that ends the open block."""
        was, self._open = self._open, ""
        return [{"type": "content_block_stop", "index": self._number}] if was else []

    def _begin(self, kind: str, block: dict[str, Any]) -> dict[str, Any]:
        self._number, self._open = self._number + 1, kind
        return {"type": "content_block_start", "index": self._number, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._number, "delta": delta}


async def _events(
    chat: ChatRequest, answering: Answering, gateway: Gateway, name: str
) -> AsyncGenerator[dict[str, Any], None]:
    """Anthropic's events in their order."""
    blocks, stops = _Blocks(), list[str]()
    answering.events = _told(answering.events, stops)
    options = StreamOptions(include_usage=True, continuous_usage_stats=True)
    reason, spent, bill, begins = "stop", dict[str, Any](), None, True
    async for chunk in chunks(answering, envelope_of(chat, gateway), 1, options, calls=tools_of(chat) is not None):
        spent, bill = chunk.get("usage") or spent, chunk.get("receipt") or bill
        if begins:
            begins = False
            message = _message(name, usage=_usage(spent["prompt_tokens"], 0, 0))
            yield {"type": "message_start", "message": message}
        for choice in chunk["choices"]:
            reason = choice["finish_reason"] or reason
            for event in blocks.take(choice["delta"]):
                yield event
    for event in blocks.end():
        yield event
    stop = stops[0] if stops else ""
    told = {"stop_reason": _reason(reason, stop), "stop_sequence": stop or None}
    cached = spent.get("prompt_tokens_details", {}).get("cached_tokens", 0)
    usage = _usage(spent["prompt_tokens"], cached, spent["completion_tokens"])
    yield {"type": "message_delta", "delta": told, "usage": usage, "receipt": bill}
    yield {"type": "message_stop"}


async def _told(
    events: AsyncGenerator[language_pb2.GenerateEvent, None], stops: list[str]
) -> AsyncGenerator[language_pb2.GenerateEvent, None]:
    """The events, the stop string that ended the answer put into `stops`."""
    async with aclosing(events):
        async for event in events:
            if event.WhichOneof("event") == "finish" and event.finish.stop:
                stops.append(event.finish.stop)
            yield event
