"""A local OTLP collector over gRPC: keeps every span it is sent."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


@dataclass(frozen=True)
class Span:
    service: str
    name: str
    trace_id: str
    span_id: str
    parent: str
    start: int  # nanoseconds
    end: int
    attributes: dict
    failed: bool


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self):
        self._spans, self._lock = [], threading.Lock()
        self._server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def Export(self, request, context):
        for resource in request.resource_spans:
            named = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
            for span in (span for scope in resource.scope_spans for span in scope.spans):
                self._keep(named["service.name"], span)
        return trace_service_pb2.ExportTraceServiceResponse()

    def _keep(self, service, span):
        attributes = {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in span.attributes}
        ids = (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
        kept = Span(
            service,
            span.name,
            *ids,
            span.start_time_unix_nano,
            span.end_time_unix_nano,
            attributes,
            span.status.code == 2,
        )
        with self._lock:
            self._spans.append(kept)

    def trace(self, trace_id):
        with self._lock:
            return [span for span in self._spans if span.trace_id == trace_id]

    def wait_for(self, trace_id, wanted, seconds=60.0):
        """The spans of a trace once these (service, name) are among them; they come in batches, a second apart."""
        deadline = time.monotonic() + seconds
        while True:
            spans = self.trace(trace_id)
            missing = set(wanted) - {(span.service, span.name) for span in spans}
            if not missing:
                return spans
            assert time.monotonic() < deadline, (missing, spans)
            time.sleep(0.1)

    def __enter__(self):
        self._server.start()
        return self

    def __exit__(self, *error):
        self._server.stop(0).wait()
