"""Who is admitted next, and how many prompt tokens a step takes.

Clients take turns, and within a client its images do; each image's questions keep their order. One client with a
thousand questions delays another's single one by a turn, not by a thousand. A step ends in time: nobody's cancellation
or next token waits longer.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass

from lm_service.engine.packed.options import PackedOptions
from lm_service.engine.packed.scheduling.sequence import Sequence


class FairQueue:
    """Sequences that wait. Preempted ones come back first, in the order they were put back."""

    def __init__(self) -> None:
        self._preempted: deque[Sequence] = deque()
        self._clients: OrderedDict[str, OrderedDict[bytes, deque[Sequence]]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._preempted
        for groups in self._clients.values():
            for line in groups.values():
                yield from line

    def push(self, sequence: Sequence) -> None:
        """To the end of its line."""
        groups = self._clients.setdefault(sequence.request.client, OrderedDict())
        groups.setdefault(sequence.group, deque()).append(sequence)
        self._count += 1

    def push_front(self, sequence: Sequence) -> None:
        """Before all others."""
        self._preempted.appendleft(sequence)
        self._count += 1

    def heads(self) -> Iterator[Sequence]:
        """The first of every line, in the order of their turns, as of now."""
        if self._preempted:
            yield self._preempted[0]
        lines = [list(groups.values()) for groups in self._clients.values()]
        for turn in range(max(map(len, lines), default=0)):
            for client in lines:
                if turn < len(client) and client[turn]:
                    yield client[turn][0]

    def pop(self, sequence: Sequence) -> None:
        """Take out a head; its client's and its image's next turns come after those of the others."""
        if self._preempted and self._preempted[0] is sequence:
            self._preempted.popleft()
        else:
            groups = self._clients[sequence.request.client]
            groups[sequence.group].popleft()
            groups.move_to_end(sequence.group)
            self._clients.move_to_end(sequence.request.client)
            self._tidy(sequence)
        self._count -= 1

    def remove(self, sequence: Sequence) -> None:
        """Take out one that no longer wants to be admitted."""
        if sequence in self._preempted:
            self._preempted.remove(sequence)
        else:
            self._clients[sequence.request.client][sequence.group].remove(sequence)
            self._tidy(sequence)
        self._count -= 1

    def _tidy(self, sequence: Sequence) -> None:
        groups = self._clients[sequence.request.client]
        if not groups[sequence.group]:
            del groups[sequence.group]
        if not groups:
            del self._clients[sequence.request.client]


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
