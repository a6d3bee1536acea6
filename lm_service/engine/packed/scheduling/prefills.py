"""Prefix nodes on their way: which of them a step takes further, and which nobody wants any more."""

from __future__ import annotations

from collections.abc import Iterator

from lm_service.engine.packed.execution.batch import Batch, Fill, FillChunk
from lm_service.engine.packed.prefix_cache.tree import Node, PrefixCache
from lm_service.engine.packed.scheduling.sequence import Request, Sequence


class Fills:
    """They take turns, so that a long one does not hold up the others."""

    def __init__(self, cache: PrefixCache) -> None:
        self._cache = cache
        self._fills: list[Fill] = []

    def __len__(self) -> int:
        return len(self._fills)

    def __iter__(self) -> Iterator[Fill]:
        return iter(self._fills)

    def add(self, node: Node, sequence: Sequence) -> Fill:
        """A new node, wanted by a sequence first."""
        fill = Fill(node, bool(node.images), context=sequence.request.context, owner=sequence.owner)
        self._fills.append(fill)
        return fill

    def take(self, batch: Batch, budget: int, turn: Request | None) -> int:
        """Add to a step what it has tokens for and has not yet; how many are left.

        A stretch goes on in the step that completes the one before it: what is before it in a step is stored first. Not
        in a step of one request: what is in that must not depend on what is filled already."""
        taken, complete = {chunk.fill for chunk in batch.fills}, batch.completes
        for fill in list(self._fills):
            if budget <= 0:
                break
            node = fill.node
            if fill.owner is not turn or fill in taken or not fill.ready_after(complete):
                continue
            chunk = FillChunk(fill, min(node.length - node.filled, budget))
            batch.fills.append(chunk)
            budget -= chunk.count
            if chunk.completes and turn is None:
                complete.add(node.id)
            self._fills.remove(fill)
            self._fills.append(fill)
        return budget

    def computed(self, chunk: FillChunk) -> None:
        """Count a chunk as done."""
        node = chunk.fill.node
        node.filled += chunk.count
        if not node.building and chunk.fill in self._fills:
            self._fills.remove(chunk.fill)

    def drop_unwanted(self) -> None:
        """Whoever wanted them has gone."""
        for fill in sorted(self._fills, key=lambda fill: -fill.node.start):  # children first
            if not (fill.node.users or fill.node.waiters or fill.node.kin):
                self._cache.detach(fill.node)
                self._fills.remove(fill)
