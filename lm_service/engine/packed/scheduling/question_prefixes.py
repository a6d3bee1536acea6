"""Shared question prefixes: what questions about the same images begin with alike, computed once for all of them.

Questions of one policy begin with the same words ("Does this image contain ..."). Where such a prefix ends depends on
nothing but the questions of the request, so that asking them again, beside whatever else, cuts them the same way.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Sequences
from functools import lru_cache
from itertools import groupby

from lm_service.engine.packed.prefix_cache.tree import Node, PrefixCache
from lm_service.engine.packed.scheduling.sequence import Request, Sequence

Rest = tuple[int, ...]  # token ids behind the last image
_LEVELS = 4  # of prefixes within prefixes
_REMEMBERED, _REMEMBERED_TOKENS = 64, 4096  # results that are kept, and the most tokens of one


def find_shared_ends(rests: Sequences[Rest], worth: int) -> list[tuple[int, ...]]:
    """For each of the rests, the lengths of the prefixes that it shares with others, shortest first.

    A prefix is shared where that spares at least `worth` tokens. It never holds the last token of a rest, whose logits
    are wanted.
    """
    short = sum(map(len, rests)) <= _REMEMBERED_TOKENS
    return list((_remembered if short else _shared_ends)(tuple(rests), worth))


def _shared_ends(rests: tuple[Rest, ...], worth: int) -> tuple[tuple[int, ...], ...]:
    ends: list[list[int]] = [[] for _ in rests]
    shareable = [rest[:-1] for rest in rests]

    def streams(group: Sequences[int], start: int, levels: int) -> int:
        """Of the rests numbered in `group`, sorted and the same before `start`, how many are left to compute."""
        if not levels:
            return len(group)
        left = 0
        for token, alike in groupby(group, lambda number: shareable[number][start : start + 1]):
            numbers = list(alike)
            if not token or len(numbers) == 1:
                left += len(numbers)
                continue
            end = _common_length(shareable[numbers[0]], shareable[numbers[-1]])
            inner = streams(numbers, end, levels - 1)
            if (inner - 1) * (end - start) < worth:
                left += inner
                continue
            left += 1
            for number in numbers:
                ends[number].append(end)
        return left

    streams(sorted(range(len(rests)), key=shareable.__getitem__), 0, _LEVELS)
    return tuple(tuple(reversed(own)) for own in ends)


def _common_length(one: Rest, other: Rest) -> int:
    differs = (place for place, (left, right) in enumerate(zip(one, other, strict=False)) if left != right)
    return next(differs, min(len(one), len(other)))


_remembered = lru_cache(maxsize=_REMEMBERED)(_shared_ends)


class QuestionPrefixes:
    """Those of all running requests: the first question that has one asks for its node, and the others share it.

    The nodes are private to the request and stay until it ends. In the tree they would cut other requests' prompts at
    places that depend on who came first; and who shares one must not depend on that either.
    """

    def __init__(self, cache: PrefixCache) -> None:
        self._cache = cache

    def find(self, sequence: Sequence, found: Node, complete: Collection[int]) -> tuple[Node, Node | None]:
        """The deepest filled node to share that goes on from `found` (or that itself), and the next one, if it is being
        filled. Nodes of the numbers in `complete` count as filled."""
        for end in sequence.shared_ends:
            node = sequence.request.question_prefixes.get(_key(sequence, found, end))
            if node is None or node.detached:
                break
            if node.building and node.id not in complete:
                return found, node
            found = node
        return found, None

    def create(self, sequence: Sequence, parent: Node) -> list[Node]:
        """Nodes for those of a sequence that go on from `parent`, as far as there is room."""
        request, created = sequence.request, []
        for end in sequence.shared_ends:
            if end <= parent.end:
                continue
            node = self._cache.add(parent, sequence.content.cut(parent.end, end).copy(), (), private=True)
            if node is None:
                break
            self._cache.acquire(node)
            request.held.append(node)
            request.question_prefixes[_key(sequence, parent, end)] = node
            created.append(node)
            parent = node
        return created

    def release(self, request: Request) -> None:
        """A request has ended."""
        for node in reversed(request.held):
            self._cache.release(node)
        request.held.clear()
        request.question_prefixes.clear()


def _key(sequence: Sequence, parent: Node, end: int) -> tuple[int, bytes]:
    """Under which a request keeps the node that ends there."""
    return parent.id, sequence.content.cut(parent.end, end).tobytes()
