"""KV of shared prefixes: a radix tree (SGLang's RadixAttention, arXiv:2312.07104) of contiguous KV, LRU by bytes.

A node holds the KV of the tokens that follow its parent's. Nodes in use are never evicted; a parent outlives its
children. A node is found by its first `GRAIN` tokens (or all of a shorter one), so that nodes stay worth sharing, and
split where two prompts part.

Where a model has recurrent layers a node also holds their state at its end. There is none in between: such a node is
found by all of its tokens, and never split.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from weakref import WeakKeyDictionary

from lm_service.engine.packed.prefix_cache.content import (
    Content,
    Head,
    PromptContent,
    common_length,
    spans_within,
    text_content,
)
from lm_service.engine.packed.prefix_cache.pool import KV
from lm_service.engine.packed.prefix_cache.states import COPIES, RecurrentState
from lm_service.engine.types import ImageSpan
from lookonce.models.text_adapter import ModelShape

GRAIN = 32


class Node:
    """KV of neighbouring tokens, filled up to `filled` of them."""

    def __init__(
        self,
        number: int,
        parent: Node | None,
        content: Content,
        images: tuple[ImageSpan, ...],
        grain: int | None = GRAIN,
    ) -> None:
        """`grain`: tokens it is found by; None: all."""
        self.id = number
        self.grain = grain
        self.parent = parent
        self.content = content
        self.images = images  # spans counted from the node's own start
        self.kv = KV()
        self.state: RecurrentState | None = None  # behind the tokens that are filled, where the model has some
        self.bytes = 0
        self.start = parent.end if parent is not None else 0
        self.filled = 0
        self.users = 0  # sequences whose leaf this is
        self.waiters = 0  # sequences waiting for it to be filled
        self.kin = 0  # children alive, those out of the tree included
        self.children: dict[bytes, Node] = {}
        self.key_lengths: Counter[int] = Counter()
        self.last_used = 0
        self.private = False  # never to be found here: whoever made it knows it; gone with its last user
        self.detached = False  # forgotten or aborted: no longer to be found, gone with its last user

    @property
    def length(self) -> int:
        """Tokens it holds."""
        return int(self.content.shape[1])

    @property
    def end(self) -> int:
        """Tokens of the whole prefix that ends with it."""
        return self.start + self.length

    @property
    def building(self) -> bool:
        """Whether some of its KV is still to be computed."""
        return self.filled < self.length

    @property
    def key(self) -> bytes:
        """Under which its parent keeps it."""
        return self.content[:, : self.grain].tobytes()

    @property
    def key_length(self) -> int:
        """Tokens of the key."""
        return min(self.length, self.grain or self.length)

    def is_finite(self) -> bool:
        """Whether all numbers that it holds are finite."""
        return self.kv.is_finite() and (self.state is None or self.state.is_finite())

    def path(self) -> list[Node]:
        """From the first node to this one."""
        nodes, node = [], self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


class PrefixCache:
    """The tree. `budget` bounds the bytes of all nodes, those in use included."""

    def __init__(self, shape: ModelShape, budget: int) -> None:
        self.shape = shape
        self._grain = None if shape.states else GRAIN
        self.budget = budget
        self.bytes = 0
        self.evictions = 0
        self._numbers = itertools.count()
        self._clock = itertools.count(1)
        self.root, self.exclusive = (Node(next(self._numbers), None, text_content((), 0, 0), ()) for _ in range(2))
        self._idle: list[tuple[int, int]] = []  # heap of (last use, id) of nodes that were evictable when pushed
        self._nodes: dict[int, Node] = {}
        self._heads: WeakKeyDictionary[Head, Node] = WeakKeyDictionary()  # nodes that end where a head does
        self.on_split: Callable[[Node, Node], None] = lambda upper, lower: None

    def match(
        self, content: PromptContent, length: int, complete: Collection[int] = (), *, exclusive: bool = False
    ) -> tuple[Node, Node | None]:
        """The deepest filled node that is a prefix of the first `length` tokens, and the node being filled that leads
        on, if any. Nodes of the numbers in `complete` count as filled, but are not cut. `exclusive`: only of nodes that
        were computed in steps of their own.

        Where the head ends is looked up once for all prompts that share it."""
        node = self._found(content.head, complete) or (self.exclusive if exclusive else self.root)
        while True:
            rest = content.cut(node.end, length)
            child, common = self._child(node, rest)
            if child is None:
                break
            if child.building and (child.id not in complete or common < child.length):
                return node, child
            if common < child.length:
                node = (self._split(child, common) if common else None) or node
                break
            node = child
            if node.end == content.head.length:
                self._heads[content.head] = node
        for used in node.path():
            used.last_used = next(self._clock)
        return node, None

    def _found(self, head: Head, complete: Collection[int]) -> Node | None:
        """The node a head ends with, if it was found and is still there, and filled."""
        node = self._heads.get(head)
        gone = node is None or node.detached or (node.building and node.id not in complete)
        return None if gone else node

    def add(
        self, parent: Node, content: Content, images: tuple[ImageSpan, ...], *, private: bool = False
    ) -> Node | None:
        """A new node to be filled, least recently used ones evicted for it; None when there still is no room."""
        size = content.shape[1] * self.shape.token_bytes + COPIES * self.shape.state_bytes
        parent.users += 1  # the parent must not go while room is made
        fits = self._make_room(size)
        parent.users -= 1
        if not fits:
            self.settle(parent)
            return None
        node = Node(next(self._numbers), parent, content, images, self._grain)
        node.kv = KV.empty(self.shape, node.length)
        node.state = RecurrentState(self.shape) if self.shape.states else None
        node.bytes = size
        self.bytes += size
        self._nodes[node.id] = node
        node.last_used = next(self._clock)
        node.private = private
        self._attach(parent, node)
        return node

    def complete(self, node: Node) -> None:
        """A node has been filled: its state stays as it is."""
        if node.state is not None:
            node.state.settle()
            node.bytes -= (COPIES - 1) * self.shape.state_bytes
            self.bytes -= (COPIES - 1) * self.shape.state_bytes

    def insert(self, parent: Node, content: Content, kv: KV, state: RecurrentState | None = None) -> None:
        """Keep computed KV of the tokens after `parent`, and the state behind them, as far as the tree hasn't them."""
        while not parent.detached:
            child, common = self._child(parent, content)
            if child is None:
                break
            if common < child.length:
                upper = self._split(child, common) if common and not child.building else None
                if upper is None:
                    return
                child = upper
            elif child.building:
                return
            parent, content, kv = child, content[:, common:], kv.cut(common)
        if parent.detached or content.shape[1] < GRAIN or content[:, : self._grain].tobytes() in parent.children:
            return
        node = self.add(parent, content.copy(), ())
        if node is not None:
            node.kv.copy_(kv)
            if node.state is not None and state is not None:
                node.state.copy_(state)
            node.filled = node.length
            self.complete(node)
            self.settle(node)

    def acquire(self, node: Node) -> None:
        """Keep a node, and so all before it, until `release`."""
        node.users += 1

    def release(self, node: Node) -> None:
        """Undo `acquire`; a node that was forgotten meanwhile goes with its last user."""
        node.users -= 1
        node.last_used = next(self._clock)
        self.settle(node)

    def detach(self, node: Node) -> int:
        """Take a node and all that follows it out of the tree; how many nodes that were."""
        if node.detached:
            return 0
        self._unlink(node)
        node.detached = True
        dropped = 1 + sum(self.detach(child) for child in list(node.children.values()))
        self.settle(node)
        return dropped

    def forget(self, keys: Collection[bytes], digests: Collection[bytes]) -> int:
        """Drop whatever was made from these embeddings; how many nodes. In use: gone with the last user."""
        concerned = [
            node
            for node in self._nodes.values()
            if any(span.reference.key in keys or span.reference.image_digest in digests for span in node.images)
        ]
        return sum(self.detach(node) for node in concerned)

    def clear(self) -> int:
        """Drop everything that is not in use now, and the rest with its last user."""
        first = [*self.root.children.values(), *self.exclusive.children.values()]
        return sum(self.detach(node) for node in first)

    def __len__(self) -> int:
        return len(self._nodes)

    def __iter__(self) -> Iterator[Node]:
        return iter(self._nodes.values())

    def _child(self, node: Node, rest: Content) -> tuple[Node | None, int]:
        for length in sorted(node.key_lengths, reverse=True):
            if length > rest.shape[1]:
                continue
            child = node.children.get(rest[:, :length].tobytes())
            if child is None:
                continue
            return child, _outside_images(child.content, common_length(child.content, rest))
        return None, 0

    def _split(self, node: Node, at: int) -> Node | None:
        """Cut a node in two, its KV copied so that each half can be evicted by itself; the upper one, or None without
        room."""
        if node.parent is None or not self._room_beside(node):
            return None
        upper = Node(next(self._numbers), node.parent, node.content[:, :at].copy(), spans_within(node.images, 0, at))
        upper.kv = node.kv.cut(0, at).clone()
        upper.filled, upper.last_used, upper.bytes = at, node.last_used, at * self.shape.token_bytes
        parent, lower_kv = node.parent, node.kv.cut(at).clone()
        self._unlink(node)
        parent.kin -= 1
        node.content, node.images = node.content[:, at:].copy(), spans_within(node.images, at, node.length)
        node.filled, node.start, node.bytes = node.length, upper.end, node.bytes - upper.bytes
        node.kv = lower_kv
        node.parent = upper
        self._nodes[upper.id] = upper
        self._attach(parent, upper)
        self._attach(upper, node)
        self.on_split(upper, node)
        return upper

    def _room_beside(self, node: Node) -> bool:
        """Whether the budget has room for a second copy of a node for a moment."""
        node.users += 1
        fits = self._make_room(node.bytes)
        node.users -= 1
        self.settle(node)
        return fits

    def _attach(self, parent: Node, node: Node) -> None:
        parent.kin += 1
        if not node.private:
            parent.children[node.key] = node
            parent.key_lengths[node.key_length] += 1

    def _unlink(self, node: Node) -> None:
        parent = node.parent
        if parent is None or parent.children.get(node.key) is not node:
            return
        del parent.children[node.key]
        width = node.key_length
        parent.key_lengths[width] -= 1
        if not parent.key_lengths[width]:
            del parent.key_lengths[width]

    def settle(self, node: Node) -> None:
        """Where nothing holds a node any more: drop it if nobody can find it, else let it be evicted."""
        if node.users or node.waiters or node.kin or node.parent is None or node.id not in self._nodes:
            return
        if node.detached or (node.private and not node.building):
            self._drop(node)
        elif not node.building:
            heapq.heappush(self._idle, (node.last_used, node.id))

    def _make_room(self, size: int) -> bool:
        while self.bytes + size > self.budget and self._idle:
            last_used, number = heapq.heappop(self._idle)
            node = self._nodes.get(number)
            if node is None or node.users or node.waiters or node.kin or node.building:
                continue  # gone or in use again since it was pushed
            if last_used != node.last_used:
                heapq.heappush(self._idle, (node.last_used, number))
                continue
            self._drop(node)
            self.evictions += 1
        return self.bytes + size <= self.budget

    def _drop(self, node: Node) -> None:
        self._unlink(node)
        node.detached = True
        del self._nodes[node.id]
        self.bytes -= node.bytes
        node.kv = KV()
        if node.state is not None:
            node.state.wipe()
            node.state = None
        if node.parent is not None:
            node.parent.kin -= 1
            self.settle(node.parent)


def _outside_images(content: Content, at: int) -> int:
    """Where to cut so that no image is cut in two: `at`, or the start of the image that goes on there."""
    if at >= content.shape[1]:
        return at
    row = -1 - int(content[0, at])  # its place within its image, for an image's token
    return max(0, at - row) if row > 0 else at
