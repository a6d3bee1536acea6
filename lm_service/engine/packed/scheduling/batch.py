"""What one step computes: who is admitted to it, how many prompt tokens it takes, spans of prefixes that are on their
way, and new tokens of sequences.

Clients take turns, and within a client its images do; each image's questions keep their order. One client with a
thousand questions delays another's single one by a turn, not by a thousand. A step ends in time: nobody's cancellation
or next token waits longer.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Collection, Iterator
from contextvars import Context
from dataclasses import dataclass, field

import torch

from lm_service.engine.packed.options import PackedOptions
from lm_service.engine.packed.prefix_cache.content import Content
from lm_service.engine.packed.prefix_cache.tree import Node, PrefixCache
from lm_service.engine.packed.scheduling.blocks import blocks_of, whole_blocks
from lm_service.engine.packed.scheduling.sequence import Request, Sequence
from lm_service.engine.types import ImageSpan
from lookonce.models.text_adapter import BothWays

_FIRST_TOKENS = 128  # before anything was measured
_LEAST_TOKENS = 64  # a step of fewer would spend most of its time on reading weights
_SMOOTHING = 0.5


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


@dataclass(eq=False)
class PrefixPrefill:
    """A prefix node on its way; `rows` holds its images' embeddings [1 + deepstack, tokens, hidden] once they are
    loaded."""

    node: Node
    loading: bool
    context: Context | None = None  # of the request that asked for it first: whose trace its loading belongs to
    owner: Request | None = None  # who shares no step with others
    rows: list[tuple[ImageSpan, torch.Tensor]] = field(default_factory=list)
    blocks: list[tuple[int, int]] = field(default_factory=list)  # of the node's tokens: [first, last) see one another
    beyond: Content | None = None  # the token behind the node that its own see, too

    @property
    def ready(self) -> bool:
        """Whether it can go on: its embeddings are here, and what comes before it is computed."""
        return self.ready_after(())

    def ready_after(self, complete: Collection[int]) -> bool:
        """The same in a step that completes the nodes of these numbers."""
        parent = self.node.parent
        return not self.loading and not (parent is not None and parent.building and parent.id not in complete)


@dataclass(frozen=True)
class PrefillChunk:
    """The next `count` tokens of a prefill."""

    prefill: PrefixPrefill
    count: int

    @classmethod
    def of(cls, prefill: PrefixPrefill, budget: int) -> PrefillChunk:
        """As many as `budget`, or fewer: tokens that see one another stay together, even if they are more."""
        node = prefill.node
        end = whole_blocks(prefill.blocks, node.filled, min(node.length, node.filled + budget))
        return cls(prefill, min(node.length, end) - node.filled)

    @property
    def rows(self) -> int:
        """Tokens of the forward."""
        return self.count + (0 if self.prefill.beyond is None else 1)

    @property
    def completes(self) -> bool:
        """Whether they are the node's last ones."""
        node = self.prefill.node
        return node.filled + self.count == node.length


@dataclass(slots=True)
class SuffixChunk:
    """The next `count` tokens of a sequence."""

    sequence: Sequence
    count: int
    first_output: int = field(init=False)  # within the chunk, first token whose logits are wanted; `count`: none's

    def __post_init__(self) -> None:
        sequence = self.sequence
        wanted = sequence.prompt_length if sequence.trie is not None else len(sequence.tokens)
        self.first_output = min(self.count, max(0, wanted - 1 - sequence.computed))


@dataclass(frozen=True)
class Batch:
    """The work of one step."""

    prefills: list[PrefillChunk] = field(default_factory=list)
    suffixes: list[SuffixChunk] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.prefills or self.suffixes)

    @property
    def completes(self) -> set[int]:
        """Numbers of the nodes whose last tokens it computes."""
        return {chunk.prefill.node.id for chunk in self.prefills if chunk.completes}

    @property
    def tokens(self) -> int:
        """Tokens of the forward."""
        return sum(chunk.rows for chunk in self.prefills) + sum(chunk.count for chunk in self.suffixes)


class Prefills:
    """They take turns, so that a long one does not hold up the others."""

    def __init__(self, cache: PrefixCache, both_ways: BothWays | None = None) -> None:
        self._cache, self._both_ways = cache, both_ways
        self._prefills: list[PrefixPrefill] = []

    def __len__(self) -> int:
        return len(self._prefills)

    def __iter__(self) -> Iterator[PrefixPrefill]:
        return iter(self._prefills)

    def add(self, node: Node, sequence: Sequence) -> PrefixPrefill:
        """A new node, wanted by a sequence first."""
        prefill = PrefixPrefill(node, bool(node.images), context=sequence.request.context, owner=sequence.owner)
        prefill.blocks = blocks_of(node, sequence.prompt_length, self._both_ways)
        if prefill.blocks and prefill.blocks[-1][1] > node.length:
            prefill.beyond = sequence.content.cut(node.end, node.end + 1)
        self._prefills.append(prefill)
        return prefill

    def take(self, batch: Batch, budget: int, turn: Request | None) -> int:
        """Add to a step what it has tokens for and has not yet; how many are left.

        A node is begun in the step that completes its parent: what is before it in a step is stored first. Not in a
        step of one request: what is in that must not depend on what is filled already."""
        taken, complete = {chunk.prefill for chunk in batch.prefills}, batch.completes
        for prefill in list(self._prefills):
            if budget <= 0:
                break
            if prefill.owner is not turn or prefill in taken or not prefill.ready_after(complete):
                continue
            chunk = PrefillChunk.of(prefill, budget)
            batch.prefills.append(chunk)
            budget -= chunk.count
            if chunk.completes and turn is None:
                complete.add(prefill.node.id)
            self._prefills.remove(prefill)
            self._prefills.append(prefill)
        return budget

    def first_shared(self, turn: Request) -> PrefixPrefill | None:
        """What this request can prefill now and other requests will find: a step of its own, so that its bits depend on
        nothing else of the request."""
        ready = (prefill for prefill in self._prefills if prefill.owner is turn and prefill.ready)
        return next((prefill for prefill in ready if not prefill.node.private), None)

    def computed(self, chunk: PrefillChunk) -> None:
        """Count a chunk as done."""
        node = chunk.prefill.node
        node.filled += chunk.count
        if node.building:
            return
        self._cache.complete(node)
        if chunk.prefill in self._prefills:
            self._prefills.remove(chunk.prefill)

    def drop_unwanted(self) -> None:
        """Whoever wanted them has gone."""
        for prefill in sorted(self._prefills, key=lambda prefill: -prefill.node.start):  # children first
            if not (prefill.node.users or prefill.node.waiters or prefill.node.kin):
                self._cache.detach(prefill.node)
                self._prefills.remove(prefill)
