"""What steps came to: counts for metrics, and how many prompt tokens the next one may take, so that it ends in time:
nobody's cancellation or next token waits longer."""

from __future__ import annotations

from dataclasses import dataclass

from lm_service.engine.packed.options import PackedOptions

_FIRST_TOKENS = 128  # before anything was measured
_LEAST_TOKENS = 64  # a step of fewer would spend most of its time on reading weights
_SMOOTHING = 0.5


@dataclass
class Counters:
    """What the scheduler has seen since the start."""

    prefill_tokens: int = 0
    decode_tokens: int = 0
    prefix_hits: int = 0
    prefix_misses: int = 0
    preemptions: int = 0


class StepBudget:
    """Prompt tokens of the next step, from the measured time per token. Grows at most twofold from step to step."""

    def __init__(self, options: PackedOptions) -> None:
        self._options = options
        self._most = _FIRST_TOKENS
        self._seconds_per_token: float | None = None

    def tokens(self, decodes: int) -> int:
        """For a step in which `decodes` sequences decode."""
        options = self._options
        bound = max(options.step_tokens - decodes, options.step_tokens // 4) if decodes else options.burst_tokens
        return min(bound, self._most)

    def note(self, prefilled: int, decoded: int, seconds: float) -> None:
        """A step with so many tokens took so long. Steps that mostly decode say nothing of prompts."""
        if prefilled < max(decoded, _LEAST_TOKENS // 2):
            return
        measured = seconds / (prefilled + decoded)
        before = measured if self._seconds_per_token is None else self._seconds_per_token
        self._seconds_per_token = before + _SMOOTHING * (measured - before)
        fitting = int(self._options.step_seconds / max(self._seconds_per_token, 1e-9))
        self._most = max(_LEAST_TOKENS, min(fitting, 2 * max(prefilled, self._most)))
