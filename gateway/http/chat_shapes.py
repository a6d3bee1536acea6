"""OpenAI's chat completion objects, whole and in chunks."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from gateway.answers import Answering, Completion
from gateway.images.library import Resolved
from gateway.receipts import finish_reason, receipt, usage
from gateway.schemas.chat_bodies import StreamOptions
from lookonce.core.errors import ErrorKind, LookonceError
from protos.lookonce.v1 import language_pb2


@dataclass(frozen=True)
class Envelope:
    """What all chunks of an answer have in common."""

    id: str
    created: int  # Unix seconds
    model: str  # as the request names it: some clients compare
    served: str  # as the receipt names it

    def wrap(self, kind: str, **fields: Any) -> dict[str, Any]:
        """The object of that kind with these fields."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, **fields}


def completion_object(
    completions: Sequence[Completion], resolved: Sequence[Resolved], envelope: Envelope, *, with_logprobs: bool
) -> dict[str, Any]:
    """The answer as one JSON."""
    finishes = [completion.finish for completion in completions if completion.finish is not None]
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": completion.text, "refusal": None},
            "logprobs": _logprobs(completion.logprobs) if with_logprobs else None,
            "finish_reason": finish_reason(completion.finish.reason) if completion.finish else "stop",
        }
        for index, completion in enumerate(completions)
    ]
    bill = receipt(resolved, finishes[0].receipt, envelope.served)
    return envelope.wrap(
        "chat.completion",
        choices=choices,
        usage=usage([finish.usage for finish in finishes]),
        system_fingerprint=_fingerprint(bill),
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
    answering: Answering, envelope: Envelope, n: int, options: StreamOptions
) -> AsyncGenerator[dict[str, Any], None]:
    """The answer in chunks: roles, deltas, finish reasons; the receipt and, when asked for, the usage in the last."""
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
            if which == "delta":
                if event.delta.text or event.delta.logprobs:
                    logprobs = _logprobs(event.delta.logprobs) if event.delta.logprobs else None
                    yield _chunk(envelope, index, {"content": event.delta.text}, extra(), logprobs=logprobs)
                continue
            finishes.append(event.finish)
            last = len(finishes) == n
            bill = receipt(answering.resolved, event.finish.receipt, envelope.served) if last else None
            fields = extra() | ({"receipt": bill} if last and not options.include_usage else {})
            yield _chunk(envelope, index, {}, fields, reason=finish_reason(event.finish.reason))
            if last:
                total = usage([finish.usage for finish in finishes])
                if options.include_usage:
                    yield envelope.wrap("chat.completion.chunk", choices=[], usage=total, receipt=bill)
    if len(finishes) < n:
        raise LookonceError(ErrorKind.UNAVAILABLE, "the language service ended the answer early", retry_after=1.0)


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


def _fingerprint(bill: dict[str, Any]) -> str | None:
    return f"fp_{bill['fingerprint'][:16]}" if bill["fingerprint"] else None
