"""W3C trace context (https://www.w3.org/TR/trace-context/): which request this work belongs to, across processes.

The trace of the work at hand is a context variable; calls between services carry it on, logs name it.
"""

from __future__ import annotations

import re
import secrets
from contextvars import ContextVar
from dataclasses import dataclass

import structlog

HEADER = "traceparent"
_PATTERN = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII)
_NO_TRACE, _NO_SPAN = "0" * 32, "0" * 16


@dataclass(frozen=True)
class Trace:
    """One step (span) of a trace, in hexadecimal."""

    trace_id: str  # 32 digits
    span_id: str  # 16 digits
    flags: str = "01"  # 2 digits

    @property
    def header(self) -> str:
        """The value of `traceparent`."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}"


_current: ContextVar[Trace | None] = ContextVar("trace", default=None)


def begin(header: str | None) -> Trace:
    """A new step within the caller's trace, or of a new one when the header is absent or malformed; made
    current, and named by every log line of this task."""
    trace_id, flags = secrets.token_hex(16), "01"
    match = _PATTERN.fullmatch(header or "")
    if match is not None and _valid(match):
        trace_id, flags = match[2], match[4]
    trace = Trace(trace_id, secrets.token_hex(8), flags)
    _current.set(trace)
    structlog.contextvars.bind_contextvars(trace_id=trace_id)
    return trace


def outgoing() -> tuple[tuple[str, str], ...]:
    """gRPC metadata that carries the current trace to another service."""
    trace = _current.get()
    return () if trace is None else ((HEADER, trace.header),)


def _valid(match: re.Match[str]) -> bool:
    version, trace_id, span_id, rest = match[1], match[2], match[3], match[5]
    known = version != "ff" and (version != "00" or rest is None)
    return known and trace_id != _NO_TRACE and span_id != _NO_SPAN
