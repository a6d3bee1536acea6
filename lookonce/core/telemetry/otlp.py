"""Steps of a trace as OpenTelemetry spans, sent over OTLP.

Imported only where an endpoint is configured: OpenTelemetry's SDK is an extra, `pip install 'lookonce[tracing]'`.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from lookonce.core.errors import invalid
from lookonce.core.telemetry.tracing import Kind, Step, Trace
from lookonce.core.version import __version__

try:
    from opentelemetry import trace as otel
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
except ImportError:
    raise invalid(
        "trace_endpoint needs OpenTelemetry: pip install 'lookonce[tracing]'", param="trace_endpoint"
    ) from None

SEND_SECONDS = 1.0
"""How long finished spans wait for company."""
TIMEOUT_SECONDS = 5.0
_KINDS = {"server": otel.SpanKind.SERVER, "client": otel.SpanKind.CLIENT, "internal": otel.SpanKind.INTERNAL}


class Exporter:
    """Owns the tracer of this process."""

    def __init__(self, service: str, endpoint: str, share: float) -> None:
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise invalid(
                f"trace_endpoint must be http://host:port or https://, got {endpoint!r}", param="trace_endpoint"
            )
        resource = Resource.create({"service.name": f"lookonce-{service}", "service.version": __version__})
        self._provider = TracerProvider(
            resource=resource, sampler=ParentBasedTraceIdRatio(share), shutdown_on_exit=False
        )
        sender = OTLPSpanExporter(endpoint=endpoint, insecure=parts.scheme == "http", timeout=TIMEOUT_SECONDS)
        self._provider.add_span_processor(BatchSpanProcessor(sender, schedule_delay_millis=SEND_SECONDS * 1000))
        self._tracer = self._provider.get_tracer("lookonce", __version__)

    def start(self, name: str, kind: Kind, parent: Trace | None, *, at: int | None = None) -> Step:
        """A span below `parent` (None: the first of a new trace), begun now or `at` nanoseconds since the epoch."""
        context = otel.set_span_in_context(
            otel.NonRecordingSpan(_context(parent) if parent else otel.INVALID_SPAN_CONTEXT)
        )
        span = self._tracer.start_span(name, context=context, kind=_KINDS[kind], start_time=at)
        made = span.get_span_context()
        return Step(Trace(f"{made.trace_id:032x}", f"{made.span_id:016x}", f"{made.trace_flags:02x}"), span)

    def close(self) -> None:
        self._provider.shutdown()


def _context(parent: Trace) -> otel.SpanContext:
    flags = otel.TraceFlags(int(parent.flags, 16) & 1)
    return otel.SpanContext(int(parent.trace_id, 16), int(parent.span_id, 16), is_remote=True, trace_flags=flags)
