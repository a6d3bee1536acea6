"""Stems while a request runs: the first question that has one asks for its node, and the others share it.

The nodes are private to the request and stay until it ends. In the tree they would cut other requests' prompts at
places that depend on who came first; and who shares a stem must not depend on that either.
"""

from __future__ import annotations

from collections.abc import Collection

from lm_service.engine.packed.prefix_cache.tree import Node, PrefixCache
from lm_service.engine.packed.scheduling.sequence import Request, Sequence


class StemNodes:
    """The stems of all running requests."""

    def __init__(self, cache: PrefixCache) -> None:
        self._cache = cache

    def find(self, sequence: Sequence, found: Node, complete: Collection[int]) -> tuple[Node, Node | None]:
        """The deepest filled stem to share that goes on from `found` (or that itself), and the next one, if it is being
        filled. Nodes of the numbers in `complete` count as filled."""
        for end in sequence.stems:
            stem = sequence.request.stems.get(_key(sequence, found, end))
            if stem is None or stem.detached:
                break
            if stem.building and stem.id not in complete:
                return found, stem
            found = stem
        return found, None

    def create(self, sequence: Sequence, parent: Node) -> list[Node]:
        """Nodes for those of its stems that go on from `parent`, as far as there is room."""
        request, created = sequence.request, []
        for end in sequence.stems:
            if end <= parent.end:
                continue
            stem = self._cache.add(parent, sequence.content.cut(parent.end, end).copy(), (), private=True)
            if stem is None:
                break
            self._cache.acquire(stem)
            request.held.append(stem)
            request.stems[_key(sequence, parent, end)] = stem
            created.append(stem)
            parent = stem
        return created

    def release(self, request: Request) -> None:
        """A request has ended."""
        for stem in reversed(request.held):
            self._cache.release(stem)
        request.held.clear()
        request.stems.clear()


def _key(sequence: Sequence, parent: Node, end: int) -> tuple[int, bytes]:
    """Under which a request keeps a stem that ends there."""
    return parent.id, sequence.content.cut(parent.end, end).tobytes()
