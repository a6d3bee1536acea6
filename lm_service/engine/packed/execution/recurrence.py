"""A step's tokens as runs, each of which goes on from one recurrent state: that of its sequence, of the prefix before
it, or of another run of the step.

Runs of prefixes come before those of the sequences that wait for them, and the tokens of a choice trie fork where
choices part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from lm_service.engine.packed.execution.choices import ChoiceTrie
from lm_service.engine.packed.prefix_cache.states import RecurrentState
from lm_service.engine.packed.prefix_cache.tree import Node
from lm_service.engine.packed.scheduling.batch import Batch, SuffixChunk
from lookonce.models.text_adapter import ModelShape, Runs

_TOGETHER = 64  # runs of no more tokens are padded to each other's length: a delta rule takes so many at once anyway


@dataclass(eq=False)
class Run:
    """Tokens [begin, begin + count) of a step."""

    begin: int
    count: int
    source: Run | RecurrentState | None  # None: the beginning of a sequence
    target: RecurrentState | None = None  # where the state behind it is kept

    @property
    def level(self) -> int:
        """How many runs of the step come before it."""
        return self.source.level + 1 if isinstance(self.source, Run) else 0

    @property
    def size(self) -> int:
        """Runs of one size are computed together."""
        return min(self.count, 2) if self.count <= _TOGETHER else (self.count - 1).bit_length()


def runs_of(batch: Batch) -> list[Run]:
    """Those of a batch, in the order of its tokens."""
    runs: list[Run] = []
    ends: dict[int, Run] = {}  # by the number of the node whose last tokens they are

    def behind(node: Node | None) -> Run | RecurrentState | None:
        return None if node is None else ends.get(node.id, node.state)

    begin = 0
    for chunk in batch.prefills:
        node = chunk.prefill.node
        run = Run(begin, chunk.count, node.state if node.filled else behind(node.parent), node.state)
        if chunk.completes:
            ends[node.id] = run
        runs.append(run)
        begin += chunk.count
    for suffix in batch.suffixes:
        sequence = suffix.sequence
        begun = sequence.computed > sequence.leaf_end
        runs += _suffix_runs(suffix, begin, sequence.state if begun else behind(sequence.leaf))
        begin += suffix.count
    return runs


def _suffix_runs(suffix: SuffixChunk, begin: int, source: Run | RecurrentState | None) -> Iterator[Run]:
    sequence = suffix.sequence
    if sequence.trie is None:
        yield Run(begin, suffix.count, source, sequence.state)
        return
    prompt = min(suffix.count, sequence.prompt_length - sequence.computed)
    if prompt:
        source = Run(begin, prompt, source, sequence.state)
        yield source
    if suffix.count > prompt:
        yield from _trie_runs(sequence.trie, begin + prompt, source)


def _trie_runs(trie: ChoiceTrie, begin: int, root: Run | RecurrentState | None) -> Iterator[Run]:
    """Those of all its tokens."""
    children, count = Counter(trie.parents), len(trie.tokens)
    ends: dict[int, Run | RecurrentState | None] = {-1: root}  # by the place that they end with
    start = 0
    for place in range(count):
        goes_on = place + 1 < count and trie.parents[place + 1] == place and children[place] == 1
        if not goes_on:
            ends[place] = run = Run(begin + start, place + 1 - start, ends[trie.parents[start]])
            start = place + 1
            yield run


class Recurrence:
    """A `Recur` over the states of one batch, whose suffixes are in order."""

    def __init__(self, shape: ModelShape, batch: Batch) -> None:
        self._shape = shape
        runs = sorted(runs_of(batch), key=lambda run: (run.level, run.size))
        self._members = [list(alike) for _, alike in groupby(runs, key=lambda run: (run.level, run.size))]
        self.groups = [_together(members, shape.device) for members in self._members]
        self._by_group = {id(group): members for group, members in zip(self.groups, self._members, strict=True)}
        self._sources = {run.source for run in runs if isinstance(run.source, Run)}
        self._behind: dict[Run, torch.Tensor] = {}  # of the state that is being read now

    def before(self, number: int, runs: Runs) -> torch.Tensor:
        return torch.stack([self._before(number, run) for run in self._by_group[id(runs)]])

    def _before(self, number: int, run: Run) -> torch.Tensor:
        if isinstance(run.source, Run):
            return self._behind[run.source]
        if run.source is not None:
            return run.source.now[number]
        state = self._shape.states[number]
        return torch.zeros(state.shape, dtype=state.dtype, device=self._shape.device)

    def keep(self, number: int, runs: Runs, states: torch.Tensor) -> None:
        members = self._by_group[id(runs)]
        self._behind.update((run, state) for run, state in zip(members, states, strict=True) if run in self._sources)
        kept = [(run.target, state) for run, state in zip(members, states, strict=True) if run.target is not None]
        if kept:
            torch._foreach_copy_([target.following[number] for target, _ in kept], [state for _, state in kept])

    def commit(self) -> None:
        """The step has succeeded: what was kept counts."""
        for members in self._members:
            for run in members:
                if run.target is not None:
                    run.target.commit()


def _together(members: Sequence[Run], device: torch.device) -> Runs:
    begin, count = (
        np.array(column, dtype=np.int64) for column in zip(*((r.begin, r.count) for r in members), strict=True)
    )
    steps = np.arange(count.max())
    tokens = begin[:, None] + np.minimum(steps, count[:, None] - 1)
    held = np.flatnonzero(steps < count[:, None])
    places = None if len(held) == tokens.size else torch.from_numpy(held).to(device)
    return Runs(torch.from_numpy(tokens).to(device), torch.from_numpy(count).to(device), places)
