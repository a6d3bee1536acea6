"""What goes into an engine and comes out of it. Knows nothing of gRPC, templates or stores."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import torch

from lookonce.core.identity import EmbeddingReference


@dataclass(frozen=True)
class ImageSpan:
    """Where an image's placeholder tokens stand in a prompt."""

    start: int
    reference: EmbeddingReference

    @property
    def end(self) -> int:
        """One past the last placeholder token."""
        return self.start + self.reference.tokens


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt with its placeholders expanded and its M-RoPE positions laid out."""

    token_ids: tuple[int, ...]
    images: tuple[ImageSpan, ...]  # in order, not overlapping
    positions: torch.Tensor  # int64 [3, len(token_ids)] on the CPU: temporal, height, width
    next_position: int  # of the first generated token, on all three rows


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of one request, already checked and bounded."""

    max_tokens: int
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # alternatives per token; None: none at all
    n: int = 1
    min_tokens: int = 0  # before so many are generated, no end token is drawn and no stop string ends the answer


@dataclass(frozen=True)
class Generation:
    """One request for one answer, or n answers to the same prompt."""

    id: str
    prompt: Prompt
    sampling: Sampling
    client: str = ""
    deadline: float | None = None  # time.monotonic() seconds
    whole: bool = False  # each answer in one delta, when it has ended
    salt: bytes = b""  # 32 bytes: KV is shared with requests of the same salt only; empty: with those without one


@dataclass(frozen=True)
class ScoreItem:
    """One question whose choices are to be weighed."""

    prompt: Prompt
    choices: tuple[tuple[int, ...], ...]  # token ids of each choice, none empty


@dataclass(frozen=True)
class Scoring:
    """Many questions, most often over one image."""

    id: str
    items: tuple[ScoreItem, ...]
    client: str = ""
    deadline: float | None = None
    alone: bool = False  # what other requests are changes nothing, to the last bit: it shares no step with them
    mixes: bool = False  # `alone` all the same: as found out, products of some rows don't depend on other rows
    salt: bytes = b""  # as in Generation


class EmbeddingSource(StrEnum):
    """Where an image's embedding came from; later is slower, but for NOT_NEEDED (its prefix KV was still there)."""

    NONE = "none"
    NOT_NEEDED = "not_needed"
    L1 = "l1"
    STORE = "store"
    FETCHED = "fetched"


@dataclass
class Timings:
    """Milliseconds from arrival at the engine, and what was reused."""

    queue_ms: float = 0.0
    load_ms: float = 0.0
    ttft_ms: float = 0.0
    total_ms: float = 0.0
    prefill_tokens: int = 0
    cached_tokens: int = 0
    prefix_hit: bool = False  # the KV of every image of the prompt (or of a text prefix) was reused
    embedding: EmbeddingSource = EmbeddingSource.NONE


@dataclass(frozen=True)
class TokenLogprob:
    """Natural log-probability of a token under the model's distribution before temperature and filters."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Delta:
    """New tokens of answer `index` and the text they complete (whole characters only)."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()

    def followed_by(self, other: Delta) -> Delta:
        """Both as one."""
        return Delta(
            self.index, self.text + other.text, self.token_ids + other.token_ids, self.logprobs + other.logprobs
        )


class FinishReason(StrEnum):
    """Why an answer ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True)
class Finish:
    """The end of answer `index`; nothing of that index follows."""

    index: int
    reason: FinishReason
    completion_tokens: int
    timings: Timings
    stop: str | None = None  # the stop string that was met


@dataclass(frozen=True)
class Scores:
    """Log-probability sums, one for each item and choice, in the order asked."""

    logprobs: tuple[tuple[float, ...], ...]
    cached_tokens: tuple[int, ...]  # reused prompt tokens of each item
    timings: Timings = field(default_factory=Timings)


@dataclass(frozen=True)
class EngineState:
    """A snapshot for Describe, metrics and admission."""

    running: int = 0
    waiting: int = 0
    max_running: int = 0
    max_waiting: int = 0
    generated_tokens: int = 0
    prefix_bytes: int = 0
    extra: dict[str, float] = field(default_factory=dict)


class EmbeddingLoader(Protocol):
    """How an engine gets an image's embedding, once it needs it."""

    async def load(self, reference: EmbeddingReference) -> tuple[torch.Tensor, EmbeddingSource]:
        """Validated rows [tokens, hidden] in the model's dtype on its device, not to be written to.

        Raises EMBEDDING_MISSING when no tier has it, EMBEDDING_INVALID when it cannot be used.
        """
        ...


class Engine(Protocol):
    """An engine: generate, score, forget, describe, close. All run on the service's event loop without blocking it."""

    def generate(self, request: Generation) -> AsyncIterator[Delta | Finish]:
        """Stream the answers. Closing the iterator cancels the work within one step.

        Raises OVERLOADED at once when the queue is full, DEADLINE_EXCEEDED, and whatever the loader raises.
        """
        ...

    async def score(self, request: Scoring) -> Scores:
        """Weigh the choices of every item without decoding. Raises as `generate` does."""
        ...

    async def forget(self, keys: Sequence[bytes], image_digests: Sequence[bytes]) -> int:
        """Drop all KV made from these embeddings; entries dropped. In use: dropped as soon as its last user ends."""
        ...

    def describe(self) -> EngineState:
        """The state now."""
        ...

    async def close(self) -> None:
        """Finish nothing more; free everything."""
        ...
