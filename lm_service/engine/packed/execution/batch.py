"""What one step computes: tokens of prefixes, and new tokens of sequences."""

from __future__ import annotations

from collections.abc import Collection
from contextvars import Context
from dataclasses import dataclass, field

import torch

from lm_service.engine.packed.prefix_cache.tree import Node
from lm_service.engine.packed.scheduling.sequence import Request, Sequence
from lm_service.engine.types import ImageSpan


@dataclass(eq=False)
class PrefixPrefill:
    """A prefix node on its way; `rows` holds its images' embeddings [tokens, hidden] once they are loaded."""

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
