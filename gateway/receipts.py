"""What an answer reused and what it cost: the receipt and the usage, as they appear in the API (DESIGN 9)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gateway.images.library import Resolved
from gateway.metrics import ANSWERS, FIRST_TOKEN_SECONDS, TOKENS
from gateway.routing.variants import DEFAULT
from lookonce.core.telemetry import tracing
from protos.lookonce.v1 import language_pb2

_SLOWNESS = {"hit": 0, "coalesced": 1, "miss": 2}


def receipt(resolved: Sequence[Resolved], language: language_pb2.LanguageReceipt, model: str) -> dict[str, Any]:
    """The receipt of one answer. `embedding` is that of the slowest image, null without images."""
    outcomes = [item.outcome for item in resolved]
    fields = {
        "embedding": max(outcomes, key=_SLOWNESS.__getitem__, default=None),
        "prefix": "hit" if language.prefix_hit else "miss",
        "encode_ms": _ms(max((item.encode_ms for item in resolved), default=0.0)),
        "prefill_tokens": language.prefill_tokens,
        "cached_tokens": language.cached_tokens,
        "queue_ms": _ms(language.queue_ms),
        "ttft_ms": _ms(language.ttft_ms),
        "model": model,
        "fingerprint": language.fingerprint or (resolved[0].reference.fingerprint if resolved else ""),
    }
    if resolved and resolved[0].variant != DEFAULT:
        fields["variant"] = resolved[0].variant
    told = {name: value for name, value in fields.items() if isinstance(value, str | int | float)}
    tracing.annotate(**told)
    ANSWERS.labels(fields["embedding"] or "none", fields["prefix"]).inc()
    FIRST_TOKEN_SECONDS.observe(language.ttft_ms / 1000)
    return fields


def usage(items: Sequence[language_pb2.Usage]) -> dict[str, Any]:
    """OpenAI's usage object over the n answers to one prompt: the prompt counts once."""
    prompt = max((item.prompt_tokens for item in items), default=0)
    completion = sum(item.completion_tokens for item in items)
    cached = max((item.cached_tokens for item in items), default=0)
    images = max((item.image_tokens for item in items), default=0)
    for kind, count in (("prompt", prompt), ("cached", cached), ("completion", completion)):
        TOKENS.labels(kind).inc(count)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached, "image_tokens": images},
    }


def finish_reason(reason: language_pb2.FinishReason) -> str:
    """OpenAI's word for why an answer ended."""
    return "length" if reason == language_pb2.LENGTH else "stop"


def _ms(value: float) -> float:
    return round(value, 3)
