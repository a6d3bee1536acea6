"""Where a prompt is cut into nodes of the prefix cache, and how much of it is looked up there."""

from __future__ import annotations

from lm_service.engine.packed.options import PackedOptions
from lm_service.engine.packed.prefix_cache.content import spans_within
from lm_service.engine.packed.prefix_cache.tree import Node, PrefixCache
from lm_service.engine.packed.scheduling.sequence import Sequence

HEADROOM = 16  # tokens a new suffix has room for beyond the prompt


class PrefixPolicy:
    """The rules for one cache."""

    def __init__(self, cache: PrefixCache, options: PackedOptions, slab_tokens: int, *, native: bool) -> None:
        """`native`: compiled kernels attend, to which a short prefix more or less is nothing."""
        self._cache, self._options, self._slab_tokens, self._native = cache, options, slab_tokens, native
        self._inline_below = options.inline_below(native=native)  # shorter prefixes are copied into each sequence

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

    def create_nodes(self, sequence: Sequence, found: Node, end: int) -> list[Node] | None:
        """Nodes for what is worth sharing beyond `found`; None, with nothing created, without room for a needed one."""
        content, images = sequence.content_until(end), sequence.prompt.images
        ends: list[tuple[int, bool]] = []  # where a node ends, and whether it must be
        if images and images[0].start > found.end and (self._native or sequence.request.isolated):
            ends.append((images[0].start, True))  # a node of its own, whoever asks first: it is the same for all images
        if images and images[-1].end > found.end:
            ends.append((images[-1].end, True))
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
