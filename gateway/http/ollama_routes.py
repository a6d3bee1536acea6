"""/api/chat, /api/generate, /api/tags: Ollama's form of a conversation, over the same core as chats."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from datetime import UTC, datetime
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
from gateway.http.event_stream import LineStream
from gateway.http.openapi import or_lines
from gateway.http.route import Route, caller_of, gateway_of, json_response, until_disconnect, validate
from gateway.schemas.ollama import (
    OllamaAnswer,
    OllamaChatRequest,
    OllamaGenerateRequest,
    OllamaModels,
    chat_of,
)
from gateway.schemas.requests import ChatRequest, StreamOptions
from gateway.schemas.tools import tools_of
from gateway.tool_calls import read_calls
from protos.lookonce.v1 import language_pb2

router = APIRouter(tags=["ollama"], route_class=Route)


@router.post(
    "/api/chat",
    summary="Answer a conversation, as Ollama does",
    response_model=OllamaAnswer,
    responses=or_lines(OllamaAnswer, examples.OLLAMA_ANSWER),
)
async def ollama_chat(request: Request, body: OllamaChatRequest) -> Response:
    """Answer a conversation as Ollama's API does: in lines of JSON, or as one object where `stream` is false."""
    return await _answer(request, body)


@router.post(
    "/api/generate",
    summary="Answer a prompt, as Ollama does",
    response_model=OllamaAnswer,
    responses=or_lines(OllamaAnswer, examples.OLLAMA_ANSWER),
)
async def ollama_generate(request: Request, body: OllamaGenerateRequest) -> Response:
    """Answer one prompt about its images, likewise."""
    return await _answer(request, body)


@router.get("/api/tags", summary="List models, as Ollama does", response_model=OllamaModels)
async def ollama_tags(request: Request) -> dict[str, Any]:
    """The model that is served, once for each of its names."""
    card = await gateway_of(request).model.card()
    when = datetime.fromtimestamp(0, UTC).isoformat()
    details = {"family": "", "format": "safetensors", "parameter_size": "", "quantization_level": ""}
    common = {"modified_at": when, "size": 0, "digest": "", "details": details}
    return {"models": [{"name": name, "model": name, **common} for name in card.names]}


async def _answer(request: Request, body: OllamaChatRequest | OllamaGenerateRequest) -> Response:
    gateway, caller, began = gateway_of(request), caller_of(request), time.monotonic_ns()
    chat, is_chat = validate(chat_of(body), ChatRequest), isinstance(body, OllamaChatRequest)
    if body.stream is False:
        work = _complete(chat, gateway, caller, began, is_chat=is_chat)
        return json_response(await until_disconnect(request, work))
    turns = await until_disconnect(request, turns_of(chat, gateway, caller.tenant))
    answering = gateway.answers.generate(turns, sampling_of(chat), caller, tools_of(chat))
    lines = _lines(chat, answering, gateway, began, is_chat=is_chat)
    return LineStream(await until_disconnect(request, begun(lines)), heartbeat=gateway.settings.heartbeat)


def _piece(chat: ChatRequest, said: dict[str, Any], *, is_chat: bool, **more: Any) -> dict[str, Any]:
    body: dict[str, Any] = {"message": {"role": "assistant", **said}} if is_chat else {"response": said["content"]}
    return {"model": chat.model, "created_at": datetime.now(UTC).isoformat(), **body, "done": False, **more}


def _end(reason: str, began: int, prompt: int, completion: int, bill: dict[str, Any]) -> dict[str, Any]:
    total = time.monotonic_ns() - began
    first = int(bill.get("ttft_ms", 0) * 1e6)
    told = {"total_duration": total, "load_duration": 0, "prompt_eval_count": prompt, "prompt_eval_duration": first}
    spent = {**told, "eval_count": completion, "eval_duration": max(0, total - first)}
    return {"done": True, "done_reason": "length" if reason == "length" else "stop", **spent, "receipt": bill}


async def _complete(
    chat: ChatRequest, gateway: Gateway, caller: Caller, began: int, *, is_chat: bool
) -> dict[str, Any]:
    tools, turns = tools_of(chat), await turns_of(chat, gateway, caller.tenant)
    (completion,), resolved = await gateway.answers.complete(turns, sampling_of(chat), caller, tools)
    finish = completion.finish
    text, calls = read_calls(completion.text) if tools is not None else (completion.text, [])
    said: dict[str, Any] = {"content": text}
    if calls:
        said["tool_calls"] = [_call(call.name, call.arguments) for call in calls]
    bill = receipt(resolved, finish.receipt, gateway.model.name)
    reason = "length" if finish.reason == language_pb2.LENGTH else "stop"
    spent = _end(reason, began, finish.usage.prompt_tokens, finish.usage.completion_tokens, bill)
    return _piece(chat, said, is_chat=is_chat, **spent)


def _call(name: str, arguments: str) -> dict[str, Any]:
    """Nothing of arguments that the answer's length cut."""
    try:
        return {"function": {"name": name, "arguments": orjson.loads(arguments)}}
    except orjson.JSONDecodeError:
        return {"function": {"name": name, "arguments": {}}}


async def _lines(
    chat: ChatRequest, answering: Answering, gateway: Gateway, began: int, *, is_chat: bool
) -> AsyncGenerator[dict[str, Any], None]:
    """Pieces of text, a call in one piece, and what it took."""
    reason, spent, bill = "stop", dict[str, Any](), dict[str, Any]()
    calls: list[dict[str, str]] = []
    options = StreamOptions(include_usage=True)
    async for chunk in chunks(answering, envelope_of(chat, gateway), 1, options, calls=tools_of(chat) is not None):
        spent, bill = chunk.get("usage") or spent, chunk.get("receipt") or bill
        for choice in chunk["choices"]:
            reason = choice["finish_reason"] or reason
            delta = choice["delta"]
            if delta.get("content"):
                yield _piece(chat, {"content": delta["content"]}, is_chat=is_chat)
            for part in delta.get("tool_calls", ()):
                if "id" in part:
                    calls.append({"name": part["function"]["name"], "arguments": ""})
                calls[-1]["arguments"] += part["function"]["arguments"]
    for call in calls:
        yield _piece(chat, {"content": "", "tool_calls": [_call(**call)]}, is_chat=is_chat)
    spending = _end(reason, began, spent.get("prompt_tokens", 0), spent.get("completion_tokens", 0), bill)
    yield _piece(chat, {"content": ""}, is_chat=is_chat, **spending)
