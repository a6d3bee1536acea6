"""One answer in the making, or one question to be scored: its tokens, and where their KV lies. Requests that can never
fit, or contradict themselves, are refused before a sequence is made for them."""

from __future__ import annotations

import time
from collections.abc import Sequence as Sequences
from collections.abc import Set
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lm_service.engine.answer import Answer, TokenTable
from lm_service.engine.packed.execution.choices import ChoiceTrie
from lm_service.engine.packed.options import PackedOptions
from lm_service.engine.packed.prefix_cache.content import (
    POSITIONS,
    Content,
    PromptContent,
    prompt_contents,
    text_content,
)
from lm_service.engine.packed.prefix_cache.pool import Slot
from lm_service.engine.packed.prefix_cache.states import RecurrentState
from lm_service.engine.packed.prefix_cache.tree import Node
from lm_service.engine.sampling import SamplerState
from lm_service.engine.types import EmbeddingSource, Generation, Prompt, Scoring, Timings
from lookonce.core.errors import ErrorKind, LookonceError, invalid


class Status(Enum):
    """Where a sequence is on its way."""

    WAITING = auto()
    RUNNING = auto()
    DONE = auto()


@dataclass(eq=False)
class Request:
    """What its sequences have in common."""

    id: str
    client: str
    kept: bool  # whether the KV of its answers is worth keeping
    isolated: bool = False  # other requests change nothing of it, to the last bit
    exclusive: bool = False  # isolated by sharing no step with others: rows may depend on the others of a step
    whole: bool = False  # its answers are handed over when they have ended, not before
    salt: bytes = b""  # of the content of its text
    context: Context = field(default_factory=copy_context, repr=False)  # of the task that made it
    arrived: float = field(default_factory=time.monotonic)
    sequences: list[Sequence] = field(default_factory=list)
    taken: bool = False  # by the thread that computes
    admitted: bool = False
    unfinished: int = 0
    present: int = 0  # sequences that wait or run
    question_prefixes: dict[tuple[int, bytes], Node] = field(default_factory=dict)  # by parent and content
    held: list[Node] = field(default_factory=list)  # of them, until the last sequence has ended; also detached ones


@dataclass(eq=False)
class Sequence:
    """Tokens [0, computed) have their KV in the prefix that ends with `leaf` and in the suffix behind it."""

    request: Request
    index: int
    prompt: Prompt
    content: PromptContent  # and that of the answer so far once preempted
    tokens: list[int]  # prompt and answer (or the tokens of a choice trie) so far
    answer: Answer | None = None  # of a generation
    sampler: SamplerState | None = None
    trie: ChoiceTrie | None = None  # of a scoring
    sums: list[float] = field(default_factory=list)  # log-probability of each of its choices, so far
    shared_ends: tuple[int, ...] = ()  # where prefixes end that other questions of the request share
    follows: bool = False  # an earlier question has the first of them, too
    status: Status = Status.WAITING
    blocked_on: Node | None = None
    leaf: Node | None = None
    leaf_end: int = 0  # tokens of the prefix that ends with `leaf`; 0 without one
    inlined: set[int] = field(default_factory=set)  # ids of nodes whose KV was copied into the suffix
    inlined_tokens: int = 0
    pending: list[Node] = field(default_factory=list)  # nodes of its prefix still to be filled
    slot: Slot | None = None
    state: RecurrentState | None = None  # behind what is computed of the suffix, where the model has some
    computed: int = 0
    path: tuple[Node, ...] = ()  # shared nodes, first to last
    order: tuple[int, ...] = ()  # their ids
    path_version: int = -1
    timings: Timings = field(default_factory=Timings)
    admissions: int = 0
    prompt_length: int = field(init=False)  # tokens of the prompt

    def __post_init__(self) -> None:
        self.prompt_length = len(self.prompt.token_ids)

    @property
    def owner(self) -> Request | None:
        """Its request, if that one shares no step with others."""
        return self.request if self.request.exclusive else None

    @property
    def length(self) -> int:
        """Tokens whose KV is or will be needed."""
        return len(self.tokens)

    @property
    def remaining(self) -> int:
        """Tokens to feed before the next one can be sampled."""
        return len(self.tokens) - self.computed

    def next_chunk(self, budget: int) -> int:
        """Tokens of the next step, about `budget` at most. Those of a choice trie go together where states fork."""
        count = min(self.remaining, budget)
        prompt = self.prompt_length - self.computed
        if self.state is None or self.trie is None or not prompt < count < self.remaining:
            return count
        return prompt or self.remaining

    @property
    def suffix_length(self) -> int:
        """Tokens in its slot."""
        return self.inlined_tokens + self.computed - self.leaf_end

    @property
    def decoding(self) -> bool:
        """Whether it has sampled a token already."""
        return self.answer is not None and bool(self.answer.tokens)

    @cached_property
    def group(self) -> bytes:
        """What fair admission takes turns by within a client: its images."""
        return b"".join(span.reference.key for span in self.prompt.images)

    def content_until(self, end: int) -> PromptContent:
        """The content of the tokens [0, end) at least."""
        have = self.content.length
        if end > have:
            self.content = self.content.followed_by(self._answer_content(have, end))
        return self.content

    def content_between(self, start: int, end: int) -> Content:
        """The content of the tokens [start, end)."""
        have = self.content.length
        if end <= have:
            return self.content.cut(start, end)
        rest = self._answer_content(max(start, have), end)
        return rest if start >= have else np.concatenate([self.content.cut(start, have), rest], axis=1)

    def _answer_content(self, start: int, end: int) -> Content:
        first = self.prompt.next_position + start - self.prompt_length
        return text_content(self.tokens[start:end], first, len(self.prompt.positions), self.request.salt)

    def positions(self, start: int, end: int) -> npt.NDArray[np.int64]:
        """Positions int64 [r, end - start] of the tokens [start, end)."""
        prompt = self.prompt_length
        if start >= prompt:
            first = self.prompt.next_position - prompt
            if self.trie is not None:
                row = self.prompt.next_position + self.trie.depths[start - prompt : end - prompt]
            else:
                row = np.arange(first + start, first + end)
            return np.broadcast_to(row, (len(self.prompt.positions), end - start))
        if end <= prompt:
            return self.content.cut(start, end)[POSITIONS:]
        return np.concatenate([self.positions(start, prompt), self.positions(prompt, end)], axis=1)

    def note_admission(self) -> None:
        """Count the wait; only the first admission of a preempted sequence counts."""
        self.status = Status.RUNNING
        self.admissions += 1
        if self.admissions == 1:
            self.timings.queue_ms = self.elapsed_ms()

    def elapsed_ms(self) -> float:
        """Milliseconds since the request arrived."""
        return (time.monotonic() - self.request.arrived) * 1000

    def note_reuse(self, reused: int) -> None:
        """Record what the first plan found in the cache."""
        if self.admissions > 1:
            return
        images = self.prompt.images
        self.timings.cached_tokens = reused
        self.timings.prefill_tokens = self.prompt_length - reused
        self.timings.prefix_hit = reused >= images[-1].end if images else reused > 0
        if images:
            self.timings.embedding = EmbeddingSource.NOT_NEEDED


def answers_to(
    generation: Generation,
    table: TokenTable,
    end_ids: Set[int],
    context: int,
    *,
    kept: bool,
    prefix_reuse: bool = True,
) -> Request:
    """The request with a sequence for each of its n answers. See `PackedEngine` for `table` and `end_ids`,
    `prompt_contents` for `prefix_reuse`."""
    prompt, sampling = generation.prompt, generation.sampling
    kept = kept and prefix_reuse
    request = Request(generation.id, generation.client, kept=kept, whole=generation.whole, salt=generation.salt)
    (content,) = prompt_contents([prompt], generation.salt, prefix_reuse=prefix_reuse)
    room = context - len(prompt.token_ids)
    for index in range(sampling.n):
        answer = Answer(index, sampling, table, end_ids, room)
        sampler = SamplerState(sampling, prompt.token_ids, index, end_ids)
        tokens = list(prompt.token_ids)
        request.sequences.append(Sequence(request, index, prompt, content, tokens, answer, sampler))
    return request


class TokenBounds(Protocol):
    """What the tokens and positions of a prompt are held to."""

    @property
    def vocabulary(self) -> int:
        """Token ids are below it."""
        ...

    @property
    def position_rows(self) -> int:
        """r of the positions [r, T]."""
        ...


def check_generation(request: Generation, context: int, shape: TokenBounds, options: PackedOptions) -> None:
    """Raise INVALID_ARGUMENT or CONTEXT_LENGTH_EXCEEDED for what cannot be answered."""
    check_prompt(request.prompt, context, shape)
    for span in request.prompt.images:  # penalties count placeholders, too
        _check_tokens(request.prompt.token_ids[span.start : span.end], shape)
    if request.sampling.max_tokens < 1:
        raise invalid(f"max_tokens must be at least 1, got {request.sampling.max_tokens}", param="max_tokens")
    named = {"logit_bias": [token for token, _ in request.sampling.bias], "stop_token_ids": request.sampling.stop_ids}
    for name, ids in {**named, "allowed_token_ids": request.sampling.allowed}.items():
        if ids and max(ids) >= shape.vocabulary:
            text = f"{name}: token {max(ids)} is outside the vocabulary of {shape.vocabulary}"
            raise invalid(text, param=name)
    if not 1 <= request.sampling.n <= options.max_running:
        raise invalid(f"n must be between 1 and {options.max_running}, got {request.sampling.n}", param="n")


def check_scoring(request: Scoring, context: int, shape: TokenBounds, options: PackedOptions) -> None:
    """Raise INVALID_ARGUMENT or CONTEXT_LENGTH_EXCEEDED for what cannot be scored."""
    for item in request.items:
        longest = max(map(len, item.choices), default=0)
        check_prompt(item.prompt, context - longest + 1, shape)
    for choices in {item.choices for item in request.items}:
        if not choices or not all(choices):
            raise invalid("choices must be given, and none of them empty", param="choices")
        if any(not 0 <= token < shape.vocabulary for choice in choices for token in choice):
            raise invalid(f"choices: a token id is outside the vocabulary of {shape.vocabulary}", param="choices")
        if sum(map(len, choices)) > options.slab_tokens // 4:
            raise invalid(f"choices must not exceed {options.slab_tokens // 4} tokens in all", param="choices")


def check_prompt(prompt: Prompt, context: int, shape: TokenBounds) -> None:
    """Raise unless the prompt fits the context, its text the vocabulary, and its images agree with its tokens."""
    length = len(prompt.token_ids)
    if length >= context:
        raise LookonceError(
            ErrorKind.CONTEXT_LENGTH_EXCEEDED,
            f"the prompt has {length} tokens; with an answer, no more than {context} fit",
            param="prompt",
        )
    if not length:
        raise invalid("the prompt is empty", param="prompt")
    if prompt.positions.shape != (shape.position_rows, length):
        raise invalid(
            f"positions are {list(prompt.positions.shape)}, not [{shape.position_rows}, {length}]", param="prompt"
        )
    end = 0
    for span in prompt.images:
        if span.start < end or span.end >= length or span.reference.tokens < 1:
            raise invalid("images must not overlap, nor end the prompt", param="prompt")
        _check_tokens(prompt.token_ids[end : span.start], shape)
        _check_tokens([token_id for _, token_id in span.markers], shape)
        end = span.end
    _check_tokens(prompt.token_ids[end:], shape)


def _check_tokens(token_ids: Sequences[int], shape: TokenBounds) -> None:
    if token_ids and (min(token_ids) < 0 or max(token_ids) >= shape.vocabulary):
        raise invalid(f"the prompt has a token id outside the vocabulary of {shape.vocabulary}", param="prompt")
