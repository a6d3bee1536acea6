"""Tokens that see one another both ways (see `BothWays`) are computed in one step: where they are in a prefix."""

from __future__ import annotations

from collections.abc import Iterable

from lm_service.engine.packed.prefix_cache.tree import Node
from lookonce.models.text_adapter import BothWays

Block = tuple[int, int]
"""First token and one past the last."""


def blocks_of(node: Node, prompt_length: int, both_ways: BothWays | None) -> list[Block]:
    """Those of a node, in order, counted from its start. The last may end behind it, in a prompt's last token."""
    if both_ways is BothWays.PROMPT:
        return [(0, prompt_length)] if node.start == 0 else []
    if both_ways is None:
        return []
    return _joined((place, place + count) for span in node.images for place, _, count in span.runs)


def _joined(runs: Iterable[Block]) -> list[Block]:
    blocks: list[Block] = []
    for first, last in runs:
        if blocks and blocks[-1][1] == first:
            first, _ = blocks.pop()
        blocks.append((first, last))
    return blocks


def whole_blocks(blocks: Iterable[Block], start: int, end: int) -> int:
    """Where to end tokens that begin at `start`, about at `end`, so that no block is cut in two: before it, or behind
    one that they begin with."""
    for first, last in blocks:
        if first < end < last:
            return first if first > start else last
    return end
