"""What is observed of the language service: Prometheus metrics, made once a process (docs/metrics.md lists them), and
the steps of a request's trace, made of its timings once it is over."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from lm_service.engine.types import EngineState, Finish, Timings
from lookonce.core.errors import LookonceError
from lookonce.core.telemetry import tracing

_SHORT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_ENGINE_GAUGES = {
    "running": "Answers and scored questions being computed.",
    "waiting": "Requests of which nothing is computed yet.",
    "prefix_bytes": "KV of prefixes, in use or kept for later requests.",
    "prefix_budget_bytes": "What KV of prefixes never exceeds.",
    "prefix_entries": "Nodes of the prefix cache: tokens whose KV is held once for all.",
    "kv_slots": "Slots for KV of sequences under way that are taken.",
    "kv_budget_bytes": "KV of sequences under way, beyond their prefixes: all slots.",
}
_ENGINE_COUNTERS = {
    "prefill_tokens": "Prompt tokens computed.",
    "decode_tokens": "Tokens of answers computed; their rate is the throughput.",
    "prefix_hits": "Sequences whose images' (or text's) KV was there.",
    "prefix_misses": "Sequences whose prefix had to be computed.",
    "prefix_evictions": "Prefixes dropped to stay within the budget.",
    "preemptions": "Times a sequence stepped back to make room, to go on later.",
    "steps": "Steps of the engine.",
    "forward_seconds": "Time of the steps' forwards, the rest being scheduling and sampling.",
}


class Metrics:
    """All collectors."""

    def __init__(self) -> None:
        self.requests = Counter("lookonce_lm_requests", "Calls by method and outcome.", ("method", "outcome"))
        self.prompt_tokens = Counter("lookonce_lm_prompt_tokens", "Tokens of prompts.")
        self.cached_tokens = Counter("lookonce_lm_cached_tokens", "Prompt tokens whose KV was reused.")
        self.vectors = Counter("lookonce_lm_vectors", "Vectors made, of inputs or of their tokens.")
        self.completion_tokens = Counter("lookonce_lm_completion_tokens", "Tokens generated.")
        self.ttft = Histogram("lookonce_lm_ttft_seconds", "Arrival to first token.", buckets=_SECONDS)
        self.duration = Histogram("lookonce_lm_request_seconds", "Arrival to last token.", buckets=_SECONDS)
        self.loads = Counter("lookonce_lm_embedding_loads", "Embeddings loaded, by where from.", ("source",))
        self.invalid = Counter("lookonce_lm_embeddings_refused", "Records refused before the model saw them.")
        self.fetch_failures = Counter("lookonce_lm_fetch_failures", "Fetches that failed, absent records apart.")
        self.inter_token = Histogram(
            "lookonce_lm_inter_token_seconds",
            "From one token of an answer to its next, on average over the answer.",
            buckets=_SHORT_SECONDS,
        )
        self.step_seconds = Histogram(
            "lookonce_lm_step_seconds", "One step of the engine, prefill and decode together.", buckets=_SHORT_SECONDS
        )
        self.refusals = Counter("lookonce_lm_refusals", "Requests refused at once because too many waited.")
        self._tensor_cache = [
            Gauge("lookonce_lm_tensor_cache_bytes", "Bytes of embeddings on the device."),
            Gauge("lookonce_lm_l1_bytes", "Deprecated: lookonce_lm_tensor_cache_bytes."),
        ]
        self._engine = _EngineCollector()
        REGISTRY.register(self._engine)

    def tensor_cache_holds(self, size: int) -> None:
        """So many bytes now."""
        for gauge in self._tensor_cache:
            gauge.set(size)

    def watch(self, describe: Callable[[], EngineState]) -> None:
        """Read what the engine counts from `describe` whenever metrics are collected."""
        self._engine.state_of = describe


class _EngineCollector(Collector):
    """An engine's state and its own counters, as they are when Prometheus asks."""

    def __init__(self) -> None:
        self.state_of: Callable[[], EngineState] = EngineState

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        state = self.state_of()
        for name, text in _ENGINE_GAUGES.items():
            yield GaugeMetricFamily(f"lookonce_lm_{name}", text, getattr(state, name))
        for name, text in _ENGINE_COUNTERS.items():
            yield CounterMetricFamily(f"lookonce_lm_{name}", text, getattr(state, name))


METRICS = Metrics()


class TracePhases:
    """Records the phases of one request, which enters the engine when this is made: the engine's loop knows nothing of
    traces."""

    def __init__(self) -> None:
        self._entered = time.time_ns()

    def answered(self, finish: Finish) -> None:
        """One of its answers ended; what all share is recorded with the first."""
        timings = finish.timings
        if finish.index == 0:
            begun = self._begin(timings)
            counts = {"prefill_tokens": timings.prefill_tokens, "cached_tokens": timings.cached_tokens}
            tracing.record("engine.prefill", self._entered, begun, timings.ttft_ms, **counts)
        tokens = finish.completion_tokens
        tracing.record(
            "engine.decode", self._entered, timings.ttft_ms, timings.total_ms, index=finish.index, tokens=tokens
        )

    def scored(self, timings: Timings) -> None:
        """Its questions are scored: the last one's prefill is the end."""
        begun = self._begin(timings)
        counts = {"prefill_tokens": timings.prefill_tokens, "cached_tokens": timings.cached_tokens}
        tracing.record("engine.score", self._entered, begun, timings.total_ms, **counts)

    def _begin(self, timings: Timings) -> float:
        """The wait for a place, and for embeddings; milliseconds until there were both."""
        loaded = timings.queue_ms + timings.load_ms
        tracing.record("engine.queue", self._entered, 0.0, timings.queue_ms)
        if timings.load_ms:
            tracing.record("engine.embedding", self._entered, timings.queue_ms, loaded, source=timings.embedding.value)
        return loaded


@contextmanager
def counted(method: str) -> Iterator[None]:
    """Count the call by how it ends."""
    outcome = "cancelled"  # also when the generator is closed from outside
    try:
        yield
        outcome = "ok"
    except LookonceError as error:
        outcome = error.kind.value
        raise
    except Exception:
        outcome = "internal"
        raise
    finally:
        METRICS.requests.labels(method, outcome).inc()


def observe_answer(timings: Timings, completion_tokens: int, *, first: bool) -> None:
    METRICS.completion_tokens.inc(completion_tokens)
    between = completion_tokens - 1
    for _ in range(between):
        METRICS.inter_token.observe((timings.total_ms - timings.ttft_ms) / 1000 / between)
    if first:
        tracing.annotate(queue_ms=timings.queue_ms, load_ms=timings.load_ms, ttft_ms=timings.ttft_ms)
        tracing.annotate(prefill_tokens=timings.prefill_tokens, cached_tokens=timings.cached_tokens)
        METRICS.cached_tokens.inc(timings.cached_tokens)
        METRICS.ttft.observe(timings.ttft_ms / 1000)
        METRICS.duration.observe(timings.total_ms / 1000)
