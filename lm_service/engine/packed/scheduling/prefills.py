"""Prefix nodes on their way: which of them a step takes further, and which nobody wants any more."""

from __future__ import annotations

from collections.abc import Iterator

from lm_service.engine.packed.execution.batch import Batch, PrefillChunk, PrefixPrefill
from lm_service.engine.packed.prefix_cache.tree import Node, PrefixCache
from lm_service.engine.packed.scheduling.sequence import Request, Sequence


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
