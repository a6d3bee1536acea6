"""What vLLM counts of its steps, kept for `describe`."""

from __future__ import annotations

from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase


class Statistics(StatLoggerBase):
    """A stat logger that is its own factory: vLLM calls it with its configuration, once it has one."""

    def __init__(self) -> None:
        self.kv_bytes = 0  # of all blocks
        self.usage = 0.0  # share of the blocks in use or kept
        self.steps = self.preemptions = 0

    def __call__(self, vllm_config: Any, engine_index: int = 0) -> Statistics:
        return self

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Called once a step."""
        if iteration_stats is not None:
            self.steps += 1
            self.preemptions += getattr(iteration_stats, "num_preempted_reqs", 0)
        if scheduler_stats is not None:
            self.usage = scheduler_stats.kv_cache_usage

    def log_engine_initialized(self) -> None:
        """Nothing."""
