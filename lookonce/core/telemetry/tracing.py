"""W3C trace context (https://www.w3.org/TR/trace-context/): which request this work belongs to, across processes.

The step at hand is a context variable; calls between services carry it on, logs name it. Where an OTLP endpoint is
configured, steps are OpenTelemetry spans as well (`export_spans`); elsewhere they are two numbers.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

import structlog

from lookonce.core.errors import invalid
from lookonce.core.version import __version__

if TYPE_CHECKING:
    from opentelemetry.trace import Span

HEADER = "traceparent"
Kind = Literal["server", "client", "internal"]
Value = str | int | float | bool
_PATTERN = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII)
SEND_SECONDS = 1.0
"""How long finished spans wait for company."""
TIMEOUT_SECONDS = 5.0
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


class Step:
    """A piece of work within a trace: `end` it once. Without an exporter nothing is recorded."""

    __slots__ = ("_span", "trace")

    def __init__(self, trace: Trace | None, span: Span | None = None) -> None:
        self.trace = trace
        self._span = span

    @property
    def outgoing(self) -> tuple[tuple[str, str], ...]:
        """gRPC metadata that carries this step to another service."""
        return () if self.trace is None else ((HEADER, self.trace.header),)

    def note(self, **attributes: Value) -> None:
        """Record facts about the step. Never a client's data: no texts, no file names."""
        if self._span is not None:
            self._span.set_attributes({f"lookonce.{name}": value for name, value in attributes.items()})

    def rename(self, name: str) -> None:
        """Give the step the name that became known on the way."""
        if self._span is not None:
            self._span.update_name(name)

    def end(self, failure: str | None = None, *, at: int | None = None) -> None:
        """The step is over, now or `at` nanoseconds since the epoch; `failure` is the kind of the error that ended
        it."""
        if self._span is not None:
            if failure is not None:
                _mark_failed(self._span, failure)
            self._span.end(at)
            self._span = None


class Exporter:
    """Sends steps as OpenTelemetry spans over OTLP. Its SDK is an extra, imported only here."""

    def __init__(self, service: str, endpoint: str, share: float) -> None:
        try:
            from opentelemetry import trace as otel
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
        except ImportError:
            text = "trace_endpoint needs OpenTelemetry: pip install 'lookonce[tracing]'"
            raise invalid(text, param="trace_endpoint") from None
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            text = f"trace_endpoint must be http://host:port or https://, got {endpoint!r}"
            raise invalid(text, param="trace_endpoint")
        resource = Resource.create({"service.name": f"lookonce-{service}", "service.version": __version__})
        self._provider = TracerProvider(
            resource=resource, sampler=ParentBasedTraceIdRatio(share), shutdown_on_exit=False
        )
        sender = OTLPSpanExporter(endpoint=endpoint, insecure=parts.scheme == "http", timeout=TIMEOUT_SECONDS)
        self._provider.add_span_processor(BatchSpanProcessor(sender, schedule_delay_millis=SEND_SECONDS * 1000))
        self._tracer = self._provider.get_tracer("lookonce", __version__)
        self._otel = otel

    def start(self, name: str, kind: Kind, parent: Trace | None, *, at: int | None = None) -> Step:
        """A span below `parent` (None: the first of a new trace), begun now or `at` nanoseconds since the epoch."""
        otel, above = self._otel, self._otel.INVALID_SPAN_CONTEXT
        if parent is not None:
            flags = otel.TraceFlags(int(parent.flags, 16) & 1)
            above = otel.SpanContext(int(parent.trace_id, 16), int(parent.span_id, 16), True, flags)
        context = otel.set_span_in_context(otel.NonRecordingSpan(above))
        span = self._tracer.start_span(name, context=context, kind=otel.SpanKind[kind.upper()], start_time=at)
        made = span.get_span_context()
        return Step(Trace(f"{made.trace_id:032x}", f"{made.span_id:016x}", f"{made.trace_flags:02x}"), span)

    def close(self) -> None:
        """Send what is still to be sent."""
        self._provider.shutdown()


_current: ContextVar[Step | None] = ContextVar("step", default=None)
_exporter: Exporter | None = None


def export_spans(service: str, endpoint: str | None, *, share: float = 1.0) -> None:
    """Send the steps of this process to an OTLP collector over gRPC ("http://host:4317"; https: TLS); None: don't.

    `share` of the traces that begin here are recorded; of others, those that their beginner records. Raises
    INVALID_ARGUMENT without OpenTelemetry or for an endpoint that is none."""
    global _exporter
    if endpoint is None:
        return
    _exporter = Exporter(service, endpoint, share)


def flush_spans() -> None:
    """Send what is still to be sent; at the end of a process (blocking, for seconds at most)."""
    if _exporter is not None:
        _exporter.close()


def is_exporting() -> bool:
    """Whether steps are sent anywhere."""
    return _exporter is not None


def begin(header: str | None, name: str = "request") -> Step:
    """A new step within the caller's trace, or of a new one when the header is absent or malformed; made
    current, and named by every log line of this task."""
    parent = _parse(header)
    if _exporter is not None:
        step = _exporter.start(name, "server", parent)
    else:
        trace_id, flags = (parent.trace_id, parent.flags) if parent else (secrets.token_hex(16), "01")
        step = Step(Trace(trace_id, secrets.token_hex(8), flags))
    _current.set(step)
    if step.trace is not None:
        structlog.contextvars.bind_contextvars(trace_id=step.trace.trace_id)
    return step


def start(name: str, kind: Kind = "internal") -> Step:
    """A step below the current one, which stays current. Without an exporter it is the current one itself."""
    current = _current.get()
    if current is None or current.trace is None:
        return Step(None)
    if _exporter is None:
        return Step(current.trace)
    return _exporter.start(name, kind, current.trace)


@contextmanager
def step(name: str, kind: Kind = "internal") -> Iterator[Step]:
    """`start`, ended with the block; an exception marks it as failed."""
    begun = start(name, kind)
    try:
        yield begun
    except BaseException as error:
        begun.end(failure_of(error))
        raise
    begun.end()


def record(name: str, begun: int, start: float, end: float, **attributes: Value) -> None:
    """A step below the current one that is over already: from `start` to `end`, in milliseconds after `begun`, which is
    in nanoseconds since the epoch."""
    current = _current.get()
    if _exporter is not None and current is not None and current.trace is not None:
        done = _exporter.start(name, "internal", current.trace, at=begun + int(start * 1e6))
        done.note(**attributes)
        done.end(at=begun + int(max(start, end) * 1e6))


def annotate(**attributes: Value) -> None:
    """Record facts about the current step."""
    current = _current.get()
    if current is not None:
        current.note(**attributes)


def failure_of(error: BaseException) -> str:
    """What a trace says of an error: its kind, never its text."""
    return str(getattr(error, "kind", None) or type(error).__name__)


def outgoing() -> tuple[tuple[str, str], ...]:
    """gRPC metadata that carries the current trace to another service."""
    current = _current.get()
    return () if current is None else current.outgoing


def _mark_failed(span: Span, failure: str) -> None:
    from opentelemetry.trace import StatusCode

    span.set_attribute("error.type", failure)
    span.set_status(StatusCode.ERROR)


def _parse(header: str | None) -> Trace | None:
    match = _PATTERN.fullmatch(header or "")
    return Trace(match[2], match[3], match[4]) if match is not None and _valid(match) else None


def _valid(match: re.Match[str]) -> bool:
    version, trace_id, span_id, rest = match[1], match[2], match[3], match[5]
    known = version != "ff" and (version != "00" or rest is None)
    return known and trace_id != _NO_TRACE and span_id != _NO_SPAN
