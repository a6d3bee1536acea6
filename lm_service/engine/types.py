"""What goes into an engine and comes out of it. Knows nothing of gRPC, templates or stores."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from lm_service.engine.grammar import Grammar
from lookonce.core.errors import LookonceError, RecordError
from lookonce.core.identity import EmbeddingReference
from lookonce.models.family import Marker


@dataclass(frozen=True)
class ImageSpan:
    """Where an image stands in a prompt: the rows of its embedding in order, and markers among them."""

    start: int
    reference: EmbeddingReference
    markers: tuple[Marker, ...] = ()  # in order; what they are follows from family, grid and how many images there are
    rows: tuple[int, int] | None = None  # first and one past the last of the embedding's, where not all are taken

    @property
    def first(self) -> int:
        """Number of the first row in the embedding."""
        return self.rows[0] if self.rows else 0

    @property
    def tokens(self) -> int:
        """How many rows."""
        return self.rows[1] - self.rows[0] if self.rows else self.reference.tokens

    @property
    def end(self) -> int:
        """One past its last token."""
        return self.start + self.tokens + len(self.markers)

    @property
    def runs(self) -> Iterator[tuple[int, int, int]]:
        """Neighbouring rows: the place of the first in the prompt, its number in the embedding, and how many."""
        place, row = 0, self.first
        for at, _ in (*self.markers, (self.end - self.start, 0)):
            if at > place:
                yield self.start + place, row, at - place
            row, place = row + at - place, at + 1


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt with its placeholders expanded and its positions laid out."""

    token_ids: tuple[int, ...]
    images: tuple[ImageSpan, ...]  # in order, not overlapping
    positions: NDArray[np.int64]  # [r, len(token_ids)], r as the model's family has it
    next_position: int  # of the first generated token, on all rows
    text: str = ""  # without images and special tokens, where the family's language half reads it


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
    special_tokens: bool = False  # part of the answer's text
    bias: tuple[tuple[int, float], ...] = ()  # added to the logits of tokens, before penalties and temperature
    allowed: tuple[int, ...] = ()  # no other token is drawn; none: all are
    bad_words: tuple[tuple[int, ...], ...] = ()  # token ids that never follow each other in an answer
    stop_ids: tuple[int, ...] = ()  # end an answer as the model's own end tokens do, also with `ignore_eos`
    grammar: Grammar | None = None  # the answer is derived from it, unless it ends for its length
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


def by_images(items: Sequence[ScoreItem]) -> list[list[int]]:
    """The places of items about the same images, in order."""
    groups: dict[tuple[bytes, ...], list[int]] = {}
    for place, item in enumerate(items):
        groups.setdefault(tuple(span.reference.key for span in item.prompt.images), []).append(place)
    return list(groups.values())


@dataclass(frozen=True)
class Scoring:
    """Many questions, most often over one image."""

    id: str
    items: tuple[ScoreItem, ...]
    client: str = ""
    deadline: float | None = None
    isolated: bool = False  # what other requests are, or other images of it, changes nothing, to the last bit
    salt: bytes = b""  # as in Generation


@dataclass(frozen=True)
class VectorRequest:
    """Prompts of which an embedding model makes vectors."""

    id: str
    prompts: tuple[Prompt, ...]
    client: str = ""
    deadline: float | None = None


class EmbeddingSource(StrEnum):
    """Where an image's embedding came from; later is slower, but for NOT_NEEDED (its prefix KV was still there)."""

    NONE = "none"
    NOT_NEEDED = "not_needed"
    TENSOR_CACHE = "l1"
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
class Vectors:
    """Float32 [rows, width] of each prompt, rows of length 1, or why there are none; in the order asked."""

    found: tuple[NDArray[np.float32] | LookonceError, ...]
    timings: Timings = field(default_factory=Timings)


@dataclass(frozen=True)
class ModelFacts:
    """What an engine says of the model it has loaded, for Describe."""

    context_length: int = 0  # tokens of prompt and answer
    dtype: str = ""
    device: str = ""
    weight_bytes: int = 0
    quantization: str = "none"
    engine: str = ""  # its name
    engine_note: str = ""  # why it is this one, where another was hoped for


@dataclass(frozen=True)
class EngineState:
    """A snapshot for Describe, metrics and admission. What an engine does not have stays zero."""

    model: ModelFacts = ModelFacts()
    running: int = 0
    waiting: int = 0
    max_running: int = 0
    max_waiting: int = 0
    generated_tokens: int = 0
    batch_invariant: bool = False  # a row of its products does not depend on how many rows there are
    prefill_tokens: int = 0
    decode_tokens: int = 0
    prefix_bytes: int = 0
    prefix_budget_bytes: int = 0
    prefix_entries: int = 0
    prefix_hits: int = 0
    prefix_misses: int = 0
    prefix_evictions: int = 0
    preemptions: int = 0
    kv_slots: int = 0
    kv_budget_bytes: int = 0
    steps: int = 0
    forward_seconds: float = 0.0


class DamagedRecord(RecordError):
    """A record no reference could make use of: not worth keeping."""


class Rows(Protocol):
    """An image's rows in the form an engine computes with."""

    @property
    def nbytes(self) -> int:
        """Bytes they take."""
        ...


R = TypeVar("R", bound=Rows)


class EmbeddingLoader(Protocol):
    """How an engine gets an image's embedding, once it needs it."""

    async def load(self, reference: EmbeddingReference, rows_of: Callable[..., R]) -> tuple[R, EmbeddingSource]:
        """The validated rows, not to be written to. `rows_of(view, *deepstack)` makes them of the bytes of a record's
        tensors, `TensorView`s [tokens, hidden] of which most families have one: the engine's own dtype and device. It
        is called in any thread, once, and raises DamagedRecord for numbers that are not finite. All calls of one engine
        pass the same function.

        Raises EMBEDDING_MISSING when no tier has it, EMBEDDING_INVALID when it cannot be used.
        """
        ...


class Engine(Protocol):
    """Six verbs. All run on the service's event loop without blocking it."""

    async def start(self, loader: EmbeddingLoader, on_failure: Callable[[], object] = ...) -> None:
        """Be ready for requests. `on_failure` is called once, on the loop, when a fault has left the engine unusable:
        the process should end."""
        ...

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
        """The state now. The model's facts are there before `start`."""
        ...

    async def close(self) -> None:
        """End all requests as UNAVAILABLE; free everything."""
        ...


class VectorEngine(Engine, Protocol):
    """An engine over an embedding model, which writes no text: `generate` and `score` raise UNSUPPORTED."""

    async def embed(self, request: VectorRequest) -> Vectors:
        """The vectors of all prompts. What keeps one from having vectors is told in its place.

        Raises OVERLOADED at once when too many wait, DEADLINE_EXCEEDED.
        """
        ...
