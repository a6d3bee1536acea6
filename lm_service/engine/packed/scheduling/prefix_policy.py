"""Where a prompt is cut into nodes of the prefix cache, how much is looked up there, and what questions share.

Questions of one policy begin with the same words ("Does this image contain ..."). Where such a prefix ends depends on
nothing but the questions of the request, so that asking them again, beside whatever else, cuts them the same way.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Sequences
from functools import lru_cache
from itertools import groupby

from lm_service.engine.packed.options import PackedOptions
from lm_service.engine.packed.prefix_cache.content import spans_within
from lm_service.engine.packed.prefix_cache.tree import Node, PrefixCache
from lm_service.engine.packed.scheduling.sequence import Request, Sequence
from lookonce.models.text_adapter import AttentionRules

HEADROOM = 16  # tokens a new suffix has room for beyond the prompt
_STATE_PER_KV = 4  # most bytes of recurrent state that are kept for a byte of an answer's KV


class PrefixPolicy:
    """The rules for one cache."""

    def __init__(
        self,
        cache: PrefixCache,
        options: PackedOptions,
        slab_tokens: int,
        *,
        native: bool,
        rules: AttentionRules | None = None,
    ) -> None:
        """`native`: compiled kernels attend, to which a short prefix more or less is nothing."""
        self._shape = cache.shape
        self._cache, self._options, self._slab_tokens, self._native = cache, options, slab_tokens, native
        self._prefix_reuse = rules is None or rules.prefix_reuse
        # shorter prefixes are copied into each sequence, unless what is seen depends on where a token is
        self._inline_below = options.inline_below(native=native or rules is not None)

    def look_until(self, sequence: Sequence, end: int) -> int:
        """How much of a prompt to look up. What others left behind the images is cut at other places than this
        request's own question prefixes, and may be there or not: scores that are to be the same every time are
        computed from the images on."""
        head = sequence.content.head.length
        if self._has_own_node(sequence, end - 1 - head, end):
            sequence.shared_ends = ()
        elif sequence.shared_ends or (head and sequence.request.isolated):
            return head
        return end - 1

    def _has_own_node(self, sequence: Sequence, rest: int, end: int) -> bool:
        """Whether so many tokens before the last one become a node of the tree."""
        several = len(sequence.request.sequences) > 1 and sequence.answer is not None
        long = rest >= self._options.long_suffix_tokens or self._is_too_long(sequence, rest, end)
        return rest > 0 and (several or long)

    def _is_too_long(self, sequence: Sequence, rest: int, end: int) -> bool:
        """Whether they would take too much of a slab."""
        return rest + len(sequence.tokens) - end + HEADROOM > self._slab_tokens * 3 // 4

    def worth_copying(self, leaf: Node) -> list[Node]:
        """The short nodes of a prefix, later ones first, as long as they leave most of a slab to the sequence."""
        chosen: list[Node] = []
        room = self._slab_tokens // 4
        for node in reversed(leaf.path()) if self._inline_below > 1 else ():
            if node.length < self._inline_below and node.length <= room:
                chosen.append(node)
                room -= node.length
        return chosen

    def worth_keeping(self, tokens: int) -> bool:
        """Whether the KV of so many tokens, and the recurrent state behind them, are worth their memory when their
        sequence has ended."""
        return tokens * self._shape.token_bytes * _STATE_PER_KV >= self._shape.state_bytes

    def create_nodes(self, sequence: Sequence, found: Node, end: int) -> list[Node] | None:
        """Nodes for what is worth sharing beyond `found`; None, with nothing created, without room for a needed one."""
        content, images = sequence.content_until(end), sequence.prompt.images
        ends: list[tuple[int, bool]] = []  # where a node ends, and whether it must be
        whole, states = sequence.prompt_length - 1, bool(self._shape.states)
        if not self._prefix_reuse and whole > found.end:
            ends.append((whole, True))
        elif images and self._prefix_reuse:
            if images[0].start > found.end and (self._native or sequence.request.isolated or states):
                ends.append((images[0].start, True))  # a node of its own, whoever asks first: all images share it
            # what goes on otherwise behind one of several images finds a recurrent state only where a node ends
            spans = images if states else images[-1:]
            ends += [(span.end, True) for span in spans if span.end > found.end]
        rest = end - 1 - (ends[-1][0] if ends else found.end)
        if self._has_own_node(sequence, rest, end):
            ends.append((end - 1, self._is_too_long(sequence, rest, end)))
        created: list[Node] = []
        parent, start = found, found.end
        for stop, needed in ends:
            node = self._cache.add(parent, content.cut(start, stop).copy(), spans_within(images, start, stop))
            if node is None and needed:
                for made in reversed(created):
                    self._cache.detach(made)
                return None
            if node is None:
                break
            created.append(node)
            parent, start = node, stop
        return created


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
