"""What a request went through in the engine, as steps of its trace: made of its timings once it is over, so that the
engine's own loop knows nothing of traces."""

from __future__ import annotations

import time

from lm_service.engine.types import Finish, Timings
from lookonce.core.telemetry import tracing


class TracePhases:
    """Records the phases of one request, which enters the engine when this is made."""

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
