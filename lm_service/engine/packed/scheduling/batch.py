"""What one step computes: spans of prefixes that are on their way, and new tokens of sequences."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextvars import Context
from dataclasses import dataclass, field

import torch

from lm_service.engine.packed.prefix_cache.tree import Node, PrefixCache
from lm_service.engine.packed.scheduling.sequence import Request, Sequence
from lm_service.engine.types import ImageSpan


@dataclass(eq=False)
class PrefixPrefill:
    """A prefix node on its way; `rows` holds its images' embeddings [1 + deepstack, tokens, hidden] once they are
    loaded."""

    node: Node
    loading: bool
    context: Context | None = None  # of the request that asked for it first: whose trace its loading belongs to
    owner: Request | None = None  # who shares no step with others
    rows: list[tuple[ImageSpan, torch.Tensor]] = field(default_factory=list)

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
        return sum(chunk.count for chunk in self.prefills) + sum(chunk.count for chunk in self.suffixes)


class Prefills:
    """They take turns, so that a long one does not hold up the others."""

    def __init__(self, cache: PrefixCache) -> None:
        self._cache = cache
        self._prefills: list[PrefixPrefill] = []

    def __len__(self) -> int:
        return len(self._prefills)

    def __iter__(self) -> Iterator[PrefixPrefill]:
        return iter(self._prefills)

    def add(self, node: Node, sequence: Sequence) -> PrefixPrefill:
        """A new node, wanted by a sequence first."""
        prefill = PrefixPrefill(node, bool(node.images), context=sequence.request.context, owner=sequence.owner)
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
            node = prefill.node
            if prefill.owner is not turn or prefill in taken or not prefill.ready_after(complete):
                continue
            chunk = PrefillChunk(prefill, min(node.length - node.filled, budget))
            batch.prefills.append(chunk)
            budget -= chunk.count
            if chunk.completes and turn is None:
                complete.add(node.id)
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
        if not node.building and chunk.prefill in self._prefills:
            self._prefills.remove(chunk.prefill)

    def drop_unwanted(self) -> None:
        """Whoever wanted them has gone."""
        for prefill in sorted(self._prefills, key=lambda prefill: -prefill.node.start):  # children first
            if not (prefill.node.users or prefill.node.waiters or prefill.node.kin):
                self._cache.detach(prefill.node)
                self._prefills.remove(prefill)
