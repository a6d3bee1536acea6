"""/v1/responses: OpenAI's other form of a conversation, over the same core as chats; kept for a next turn if wanted."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from gateway.answers import receipt, usage
from gateway.conversation import Caller, ImagePart, Turn
from gateway.core import Gateway
from gateway.http import examples
from gateway.http.chat_routes import begun, chunks, envelope_of, sampling_of, turns_of
from gateway.http.event_stream import NamedEventStream
from gateway.http.openapi import or_events
from gateway.http.route import Route, caller_of, gateway_of, json_response, tenant_of, until_disconnect, validate
from gateway.schemas.requests import REFERENCE, ChatRequest, StreamOptions
from gateway.schemas.responses import ErasedResponse, ResponseEvent, ResponseObject
from gateway.schemas.responses_api import ResponsesRequest, chat_of
from gateway.schemas.tools import tools_of
from gateway.tool_calls import Call, read_calls
from lookonce.core.errors import LookonceError
from protos.lookonce.v1 import language_pb2

router = APIRouter(tags=["responses"], route_class=Route)
_FIELDS = {"messages": "input", "response_format.json_schema.schema": "text.format.schema"}
"""What errors call a chat's fields here."""


@router.post(
    "/v1/responses",
    summary="Answer a conversation, and keep the answer",
    response_model=ResponseObject,
    responses=or_events(ResponseEvent, {"type": "response.completed", "response": examples.RESPONSE}, named=True),
)
async def create_response(request: Request, body: ResponsesRequest) -> Response:
    """Answer as OpenAI's Responses API does; with a receipt. Unless `store` is false, the conversation is kept so that
    `previous_response_id` can go on from it, for no longer than any of its images is."""
    gateway, caller = gateway_of(request), caller_of(request, body.user or body.safety_identifier)
    work = _begin(body, gateway, caller)
    making = await until_disconnect(request, work)
    if not body.stream:
        return json_response(await until_disconnect(request, _complete(making, gateway, caller)))
    stream = await until_disconnect(request, begun(_events(making, gateway, caller)))
    return NamedEventStream(stream, heartbeat=gateway.settings.heartbeat)


@router.get("/v1/responses/{response_id}", summary="Look at a response", response_model=ResponseObject)
async def get_response(request: Request, response_id: str) -> Response:
    """A response that was kept."""
    kept = await gateway_of(request).images.responses.find(tenant_of(request), response_id)
    return json_response(kept["response"])


@router.delete("/v1/responses/{response_id}", summary="Erase a response", response_model=ErasedResponse)
async def delete_response(request: Request, response_id: str) -> Response:
    """Erase a response that was kept. Those that follow it stay."""
    await gateway_of(request).images.responses.drop(tenant_of(request), response_id)
    return json_response({"id": response_id, "object": "response", "deleted": True})


@dataclass
class _Making:
    """A response in the making."""

    body: ResponsesRequest
    chat: ChatRequest
    turns: tuple[Turn, ...]
    model: str
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = field(default_factory=lambda: f"resp_{uuid.uuid4().hex}")
    message: str = field(default_factory=lambda: f"msg_{uuid.uuid4().hex}")

    def object(self, status: str, output: Sequence[dict[str, Any]] = (), **more: Any) -> dict[str, Any]:
        """OpenAI's object."""
        body = self.body
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
        form = body.text.format.model_dump(by_alias=True, exclude_none=True) if body.text and body.text.format else None
        chosen = body.tool_choice or "auto"
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": cut,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self.model,
            "output": list(output),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "store": body.store is not False,
            "temperature": body.temperature,
            "text": {"format": form or {"type": "text"}},
            "tool_choice": chosen if isinstance(chosen, str) else chosen.model_dump(),
            "tools": [{"description": None, "parameters": None, "strict": True, **tool} for tool in tools],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
            **more,
        }

    def text_item(self, text: str, status: str = "completed") -> dict[str, Any]:
        """The answer's words."""
        content = [_text_part(text)] if status == "completed" or text else []
        return {"type": "message", "id": self.message, "status": status, "role": "assistant", "content": content}


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _call_item(call: Call, status: str = "completed") -> dict[str, Any]:
    item = {"type": "function_call", "id": f"fc_{call.id.removeprefix('call_')}", "call_id": call.id}
    return {**item, "name": call.name, "arguments": call.arguments if status == "completed" else "", "status": status}


async def _begin(body: ResponsesRequest, gateway: Gateway, caller: Caller) -> _Making:
    """Check the request and have its images. Raises what is wrong, naming the field."""
    before: list[dict[str, Any]] = []
    if body.previous_response_id is not None:
        try:
            kept = await gateway.images.responses.find(caller.tenant, body.previous_response_id)
        except LookonceError as error:
            raise LookonceError(error.kind, error.message, param="previous_response_id") from error
        before = kept["messages"]
    try:
        chat = validate(chat_of(body, before), ChatRequest)
        turns = await turns_of(chat, gateway, caller.tenant)
    except LookonceError as error:
        raise _renamed(error) from error
    return _Making(body, chat, turns, body.model or gateway.model.name)


def _renamed(error: LookonceError) -> LookonceError:
    """The same, naming the field as it is called here."""
    for theirs, ours in _FIELDS.items():
        if error.param is not None and error.param.startswith(theirs):
            message = error.message.replace(error.param, ours)
            return LookonceError(error.kind, message, param=ours, retry_after=error.retry_after)
    return error


async def _complete(making: _Making, gateway: Gateway, caller: Caller) -> dict[str, Any]:
    tools = tools_of(making.chat)
    try:
        (completion,), resolved = await gateway.answers.complete(making.turns, sampling_of(making.chat), caller, tools)
    except LookonceError as error:
        raise _renamed(error) from error
    text, calls = read_calls(completion.text) if tools is not None else (completion.text, [])
    is_cut = completion.finish.reason == language_pb2.LENGTH
    bill = receipt(resolved, completion.finish.receipt, gateway.model.name)
    output = _output(making, text, calls)
    spent = _usage(usage([completion.finish.usage]))
    answer = making.object("incomplete" if is_cut else "completed", output, usage=spent, receipt=bill)
    await _keep(making, answer, text, calls, gateway, caller)
    return answer


def _output(making: _Making, text: str, calls: Sequence[Call]) -> list[dict[str, Any]]:
    said = [making.text_item(text)] if text or not calls else []
    return said + [_call_item(call) for call in calls]


def _usage(spent: dict[str, Any]) -> dict[str, Any]:
    return {
        "input_tokens": spent["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": spent["prompt_tokens_details"]["cached_tokens"]},
        "output_tokens": spent["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": spent["total_tokens"],
    }


async def _keep(
    making: _Making, answer: dict[str, Any], text: str, calls: Sequence[Call], gateway: Gateway, caller: Caller
) -> None:
    """Keep it for a next turn, if that is wanted."""
    if making.body.store is False:
        return
    said: dict[str, Any] = {"role": "assistant", "content": text}
    if calls:
        said = {**said, "content": text or None, "tool_calls": [call.as_json() for call in calls]}
    messages = [*map(_message, making.turns), said]
    digests = {part.record.digest for turn in making.turns for part in turn.parts if isinstance(part, ImagePart)}
    document = {"response": answer, "messages": messages}
    await gateway.images.responses.keep(caller.tenant, making.id, document, sorted(digests))


def _message(turn: Turn) -> dict[str, Any]:
    """A turn as a chat's message; images by their ids."""
    parts = [
        {"type": "image_url", "image_url": f"{REFERENCE}{part.record.id}"}
        if isinstance(part, ImagePart)
        else {"type": "text", "text": part}
        for part in turn.parts
    ]
    has_image = any(isinstance(part, ImagePart) for part in turn.parts)
    content: Any = parts if has_image else "".join(part for part in turn.parts if isinstance(part, str))
    message: dict[str, Any] = {"role": turn.role, "content": content}
    if turn.calls:
        called = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in turn.calls
        ]
        message |= {"content": content or None, "tool_calls": called}
    if turn.role == "tool":
        message["tool_call_id"] = ""
    return message


class _Items:
    """The items of a streamed answer, from the pieces of a chat's."""

    def __init__(self, making: _Making) -> None:
        self._making = making
        self.text, self.calls = "", list[Call]()
        self._open: dict[str, Any] | None = None
        self.output: list[dict[str, Any]] = []

    def take(self, delta: dict[str, Any]) -> list[dict[str, Any]]:
        """The events of a chunk."""
        found: list[dict[str, Any]] = []
        if delta.get("content"):
            if not self.text:
                found += self._begin_text()
            self.text += delta["content"]
            place = {"item_id": self._making.message, "output_index": len(self.output), "content_index": 0}
            found.append({"type": "response.output_text.delta", **place, "delta": delta["content"], "logprobs": []})
        for part in delta.get("tool_calls", ()):
            if "id" in part:
                found += self.end()
                self.calls.append(Call(len(self.calls), part["function"]["name"], id=part["id"]))
                self._open = _call_item(self.calls[-1], "in_progress")
                found.append(self._added(self._open))
            call, said = self.calls[-1], part["function"]["arguments"]
            call.arguments += said
            if said and self._open is not None:
                place = {"item_id": self._open["id"], "output_index": len(self.output)}
                found.append({"type": "response.function_call_arguments.delta", **place, "delta": said})
        return found

    def end(self) -> list[dict[str, Any]]:
        """The events that end the item which is open."""
        item, self._open = self._open, None
        if item is None:
            return []
        index = len(self.output)
        if item["type"] == "function_call":
            done = _call_item(self.calls[-1])
            place = {"item_id": done["id"], "output_index": index}
            told = {**place, "name": done["name"], "arguments": done["arguments"]}
            found = [{"type": "response.function_call_arguments.done", **told}]
        else:
            done = self._making.text_item(self.text)
            place = {"item_id": done["id"], "output_index": index, "content_index": 0}
            found = [
                {"type": "response.output_text.done", **place, "text": self.text, "logprobs": []},
                {"type": "response.content_part.done", **place, "part": _text_part(self.text)},
            ]
        self.output.append(done)
        return [*found, {"type": "response.output_item.done", "output_index": index, "item": done}]

    def begin_nothing(self) -> list[dict[str, Any]]:
        """An answer of no text is an empty one."""
        return self._begin_text() if not self.output and self._open is None else []

    def _begin_text(self) -> list[dict[str, Any]]:
        self._open = self._making.text_item("", "in_progress")
        place = {"item_id": self._making.message, "output_index": len(self.output), "content_index": 0}
        return [self._added(self._open), {"type": "response.content_part.added", **place, "part": _text_part("")}]

    def _added(self, item: dict[str, Any]) -> dict[str, Any]:
        return {"type": "response.output_item.added", "output_index": len(self.output), "item": item}


async def _events(making: _Making, gateway: Gateway, caller: Caller) -> AsyncGenerator[dict[str, Any], None]:
    """OpenAI's events in their order, numbered."""
    number = -1

    def numbered(event: dict[str, Any]) -> dict[str, Any]:
        nonlocal number
        number += 1
        return {**event, "sequence_number": number}

    tools, items = tools_of(making.chat), _Items(making)
    answering = gateway.answers.generate(making.turns, sampling_of(making.chat), caller, tools)
    envelope, options = envelope_of(making.chat, gateway), StreamOptions(include_usage=True)
    reason, spent, bill = "stop", None, None
    begins = True
    try:
        async for chunk in chunks(answering, envelope, 1, options, calls=tools is not None):
            if begins:
                begins = False
                yield numbered({"type": "response.created", "response": making.object("in_progress")})
                yield numbered({"type": "response.in_progress", "response": making.object("in_progress")})
            spent, bill = chunk.get("usage") or spent, chunk.get("receipt") or bill
            for choice in chunk["choices"]:
                reason = choice["finish_reason"] or reason
                for event in items.take(choice["delta"]):
                    yield numbered(event)
    except LookonceError as error:
        raise _renamed(error) from error
    for event in [*items.begin_nothing(), *items.end()]:
        yield numbered(event)
    status = "incomplete" if reason == "length" else "completed"
    more = {"usage": _usage(spent) if spent is not None else None, "receipt": bill}
    answer = making.object(status, items.output, **more)
    await _keep(making, answer, items.text, items.calls, gateway, caller)
    yield numbered({"type": f"response.{status}", "response": answer})
