"""Stems while a request runs: the first question that has one computes it in its own tail, and the others share it.

Their nodes are private to the request and stay until it ends. In the tree they would cut other requests' prompts at
places that depend on who came first; and who computes a stem, and who shares it, must not depend on that either.
"""

from __future__ import annotations

from lm_service.engine.packed.pool import TailPool
from lm_service.engine.packed.prefix_cache import Node, PrefixCache
from lm_service.engine.packed.sequence import Request, Sequence


class StemNodes:
    """The stems of all running requests."""

    def __init__(self, pool: TailPool, cache: PrefixCache) -> None:
        self._pool, self._cache = pool, cache

    def find(self, sequence: Sequence, found: Node) -> tuple[Node, Node | None]:
        """The deepest filled stem to share that goes on from `found` (or that itself), and the next one, if it is being
        filled."""
        for end in sequence.stems[: sequence.followed]:
            stem = sequence.request.stems.get((found.id, sequence.content.cut(found.end, end).tobytes()))
            if stem is None or stem.detached:
                break
            if stem.building:
                return found, stem
            found = stem
        return found, None

    def begin(self, sequence: Sequence) -> None:
        """Let an admitted sequence fill the stems that are its to compute, as far as there is room."""
        request, node = sequence.request, sequence.leaf
        for end in sequence.stems[sequence.followed :]:
            if node is None or end <= node.end:
                return
            content = sequence.content.cut(node.end, end).copy()
            stem = self._cache.add(node, content, (), private=True)
            if stem is None:
                return
            self._cache.acquire(stem)
            request.held.append(stem)
            request.stems[node.id, content.tobytes()] = stem
            sequence.growing.append(stem)
            node = stem

    def fill(self, sequence: Sequence) -> None:
        """Copy what a sequence's tail holds of its stems by now."""
        while sequence.growing and sequence.slot is not None and sequence.growing[0].end <= sequence.computed:
            stem = sequence.growing.pop(0)
            begin = sequence.inlined_tokens + stem.start - sequence.leaf_end
            stem.kv.copy_(self._pool.kv(sequence.slot).cut(begin, begin + stem.length))
            stem.filled = stem.length

    def give_up(self, sequence: Sequence) -> None:
        """A sequence stops; what it has not filled is of no use to others."""
        for stem in reversed(sequence.growing):
            self._cache.detach(stem)
        sequence.growing.clear()

    def release(self, request: Request) -> None:
        """A request has ended."""
        for stem in reversed(request.held):
            self._cache.release(stem)
        request.held.clear()
        request.stems.clear()
