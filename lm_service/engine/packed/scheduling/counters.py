"""What the scheduler counts, for metrics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    """What the scheduler has seen since the start."""

    prefill_tokens: int = 0
    decode_tokens: int = 0
    prefix_hits: int = 0
    prefix_misses: int = 0
    preemptions: int = 0
