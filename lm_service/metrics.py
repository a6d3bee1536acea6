"""Prometheus metrics of the language service: made once a process."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import Counter, Gauge, Histogram, start_http_server

from lm_service.engine.types import EngineState
from lookonce.errors import invalid

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """All collectors."""

    def __init__(self) -> None:
        self.requests = Counter("lookonce_lm_requests", "Calls by method and outcome.", ("method", "outcome"))
        self.prompt_tokens = Counter("lookonce_lm_prompt_tokens", "Tokens of prompts.")
        self.cached_tokens = Counter("lookonce_lm_cached_tokens", "Prompt tokens whose KV was reused.")
        self.completion_tokens = Counter("lookonce_lm_completion_tokens", "Tokens generated.")
        self.ttft = Histogram("lookonce_lm_ttft_seconds", "Arrival to first token.", buckets=_SECONDS)
        self.duration = Histogram("lookonce_lm_request_seconds", "Arrival to last token.", buckets=_SECONDS)
        self.loads = Counter("lookonce_lm_embedding_loads", "Embeddings loaded, by where from.", ("source",))
        self.invalid = Counter("lookonce_lm_embeddings_refused", "Records refused before the model saw them.")
        self.fetch_failures = Counter("lookonce_lm_fetch_failures", "Fetches that failed, absent records apart.")
        self.l1_bytes = Gauge("lookonce_lm_l1_bytes", "Bytes of embeddings on the device.")
        self.running = Gauge("lookonce_lm_running", "Requests under way.")
        self.waiting = Gauge("lookonce_lm_waiting", "Requests waiting.")
        self.prefix_bytes = Gauge("lookonce_lm_prefix_bytes", "Bytes of KV kept for later requests.")

    def watch(self, describe: Callable[[], EngineState]) -> None:
        """Read the gauges of the engine's state from `describe` whenever they are collected."""
        self.running.set_function(lambda: describe().running)
        self.waiting.set_function(lambda: describe().waiting)
        self.prefix_bytes.set_function(lambda: describe().prefix_bytes)


METRICS = Metrics()


def serve_metrics(listen: str) -> None:
    """Answer Prometheus on "host:port". INVALID_ARGUMENT when that cannot be listened on."""
    host, _, port = listen.rpartition(":")
    if not port.isdigit():
        raise invalid(f"metrics_listen must be host:port, got {listen!r}", param="metrics_listen")
    try:
        start_http_server(int(port), addr=host or "127.0.0.1")
    except OSError:
        raise invalid(
            f"metrics_listen: cannot listen on {listen}: is the address in use?", param="metrics_listen"
        ) from None
