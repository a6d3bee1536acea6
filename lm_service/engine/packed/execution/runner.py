"""Runs one batch through the model: one forward over all its tokens, without padding, and how long that takes. Its
logits make answers a token longer, and scores."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from types import TracebackType
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from lm_service.engine.answer import Answer
from lm_service.engine.packed.execution.attention import attention_over
from lm_service.engine.packed.execution.choices import gather_logprobs
from lm_service.engine.packed.execution.kernel_attention import KernelAttention
from lm_service.engine.packed.execution.plan import plans_of, suffix_order
from lm_service.engine.packed.execution.recurrence import Recurrence
from lm_service.engine.packed.prefix_cache.content import POSITIONS
from lm_service.engine.packed.prefix_cache.pool import SuffixPool
from lm_service.engine.packed.scheduling.batch import Batch, PrefillChunk, SuffixChunk
from lm_service.engine.packed.scheduling.sequence import Sequence
from lm_service.engine.sampling import SamplerState, finite_rows, sample, token_logprobs
from lm_service.engine.types import TokenLogprob
from lookonce.models.compiled import attention_kernels
from lookonce.models.text_adapter import Attend, Deepstack, ModelAdapter, RecurrentAdapter


class Runner:
    """The model, and the pool its sequences' keys and values go to."""

    def __init__(self, model: ModelAdapter, pool: SuffixPool, *, native: bool = True) -> None:
        """`native`: attend by compiled kernels where there are some for this model."""
        self._model = model
        self._recurrence: Recurrence | None = None  # of the latest step, where the model has recurrent layers
        kernels = attention_kernels(model.shape) if native else None
        self.native = kernels is not None
        """Whether there are such kernels."""
        self._attention: Callable[[Batch], Attend]
        if kernels is not None:
            self._attention = KernelAttention(kernels, model.shape, pool)
        else:
            self._attention = lambda batch: attention_over(model.shape, pool, plans_of(model.shape, pool, batch))

    @torch.inference_mode()
    def run(self, batch: Batch) -> torch.Tensor | None:
        """Logits [rows, vocabulary] of the tokens that want them, in the order of `batch.suffixes`, which this sorts.

        Running a batch again computes the same: nothing is counted as computed before `commit`. None when no row is
        wanted.
        """
        batch.suffixes.sort(key=suffix_order)
        device = self._model.shape.device
        ids, positions, rows = _inputs(batch, self._model.shape.position_rows)
        token_ids = torch.from_numpy(ids).to(device)
        hidden = self._model.embed(token_ids.clamp_(min=0))
        begin, deepstack = 0, list[Deepstack]()
        for chunk in batch.prefills:
            deepstack += _place_images(hidden, begin, chunk)
            begin += chunk.rows
        attention = self._attention(batch)
        wanted = torch.tensor(rows, dtype=torch.int64, device=device)
        places = torch.from_numpy(positions).to(device)
        logits = self._forward(batch, hidden, places, attention, wanted, *((deepstack,) if deepstack else ()))
        return logits if rows else None

    def _forward(self, batch: Batch, *inputs: Any) -> torch.Tensor:
        if not self._model.shape.states:
            return self._model.forward(*inputs)
        self._recurrence = Recurrence(self._model.shape, batch)
        forward = partial(cast(RecurrentAdapter, self._model).forward, recur=self._recurrence)
        return forward(*inputs)

    def commit(self) -> None:
        """The latest step has succeeded: the recurrent states behind it are those to go on from."""
        if self._recurrence is not None:
            self._recurrence.commit()
            self._recurrence = None


class WallClock:
    """How long forwards take: seconds within its `with` blocks."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds += time.perf_counter() - self._began


class EventClock:
    """The same on a GPU, where a call returns when its kernels are queued: by pairs of its events, which are asked for
    later, so that nobody waits."""

    def __init__(self, event: Callable[[], Any], stream: Callable[[], Any] = lambda: None) -> None:
        """`event`: makes one that can be timed (torch.cuda.Event); `stream`: what the forwards are queued in."""
        self._event, self._stream = event, stream
        self._pairs: deque[tuple[Any, Any]] = deque()
        self._seconds = 0.0

    @property
    def seconds(self) -> float:
        """Of the blocks whose work is done."""
        while self._pairs and self._pairs[0][1].query():
            begin, end = self._pairs.popleft()
            self._seconds += begin.elapsed_time(end) / 1000
        return self._seconds

    def __enter__(self) -> None:
        self._begin = self._event()
        self._begin.record(self._stream())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            end = self._event()
            end.record(self._stream())
            self._pairs.append((self._begin, end))
            _ = self.seconds  # those that are done go: as many are kept as steps are under way


def work_clock(device: torch.device) -> WallClock | EventClock:
    """That of a model's first device."""
    if device.type == "cuda":

        def event() -> Any:
            with torch.cuda.device(device):
                return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

        return EventClock(event, lambda: torch.cuda.current_stream(device))
    return WallClock()


def _inputs(batch: Batch, position_rows: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], list[int]]:
    """Token ids [T] (negative: an image's rows), positions [r, T], and the rows whose logits are wanted."""
    total = batch.tokens
    ids, positions = np.empty(total, dtype=np.int64), np.empty((position_rows, total), dtype=np.int64)
    rows: list[int] = []
    single: list[tuple[int, int, int]] = []  # tokens that decode: row, id, position
    begin = 0
    for prefill in batch.prefills:
        node, end = prefill.prefill.node, begin + prefill.count
        span = node.content[:, node.filled : node.filled + prefill.count]
        ids[begin:end], positions[:, begin:end] = span[0], span[POSITIONS:]
        _place_markers(ids[begin:end], prefill)
        begin += prefill.rows
        if (beyond := prefill.prefill.beyond) is not None:
            ids[end:begin], positions[:, end:begin] = beyond[0], beyond[POSITIONS:]
    for suffix in batch.suffixes:
        sequence, end = suffix.sequence, begin + suffix.count
        computed = sequence.computed
        if suffix.count == 1 and computed >= sequence.prompt_length and sequence.trie is None:
            single.append(
                (begin, sequence.tokens[computed], sequence.prompt.next_position + computed - sequence.prompt_length)
            )
            rows.append(begin)
        else:
            stop = computed + suffix.count
            ids[begin:end] = sequence.tokens[computed:stop]
            positions[:, begin:end] = sequence.positions(computed, stop)
            rows.extend(range(begin + suffix.first_output, end))
        begin = end
    if single:
        at, tokens, places = np.array(single, dtype=np.int64).T
        ids[at], positions[:, at] = tokens, places
    return ids, positions, rows


def _place_images(hidden: torch.Tensor, begin: int, chunk: PrefillChunk) -> Iterator[Deepstack]:
    """Write the embeddings' rows over the placeholders of a chunk, whose first token is row `begin` of the step's; what
    is to be added behind the first layers."""
    start = chunk.prefill.node.filled
    end = start + chunk.count
    for span, rows in chunk.prefill.rows:
        for place, row, count in span.runs:
            first, last = max(place, start), min(place + count, end)
            if first < last:
                part, at = rows[:, row + first - place : row + last - place], begin + first - start
                hidden[at : at + last - first] = part[0]
                if len(part) > 1:
                    yield Deepstack(at, part[1:])


def _place_markers(ids: npt.NDArray[np.int64], chunk: PrefillChunk) -> None:
    """Write the ids of the tokens among an image's rows that are none of them."""
    start = chunk.prefill.node.filled
    for span in chunk.prefill.node.images:
        for at, token_id in span.markers:
            if 0 <= span.start + at - start < chunk.count:
                ids[span.start + at - start] = token_id


def outputs(batch: Batch) -> list[tuple[SuffixChunk, int, int]]:
    """Chunks that want logits, with their rows [first, last) of them."""
    found, row = [], 0
    for chunk in batch.suffixes:
        count = chunk.count - chunk.first_output
        if count:
            found.append((chunk, row, row + count))
            row += count
    return found


def split_bad(
    wanted: list[tuple[SuffixChunk, int, int]], logits: torch.Tensor
) -> tuple[list[tuple[SuffixChunk, int, int]], list[Sequence]]:
    """Those with finite logits, and the sequences without."""
    finite = finite_rows(logits)
    if all(finite):
        return wanted, []
    good = [item for item in wanted if all(finite[item[1] : item[2]])]
    return good, [chunk.sequence for chunk, first, last in wanted if not all(finite[first:last])]


def extend_answers(wanted: list[tuple[SuffixChunk, int, int]], logits: torch.Tensor) -> list[Sequence]:
    """Sample the next token of every answer; the sequences that have one more."""
    chosen = [(chunk.sequence, row) for chunk, row, _ in wanted if chunk.sequence.answer is not None]
    if not chosen:
        return []
    states = [sequence.sampler for sequence, _ in chosen if sequence.sampler is not None]
    if len(chosen) < logits.shape[0]:
        logits = logits[torch.tensor([row for _, row in chosen], device=logits.device)]
    tokens = sample(logits, states)
    logprobs = token_logprobs(logits, tokens, states)
    for (sequence, _), state, token, logprob in zip(chosen, states, tokens, logprobs, strict=True):
        answer = sequence.answer
        if answer is None:
            continue
        if not answer.tokens:
            sequence.timings.ttft_ms = sequence.elapsed_ms()
        _push(sequence, answer, state, token, logprob)
        if answer.reason is not None:
            sequence.timings.total_ms = sequence.elapsed_ms()
    return [sequence for sequence, _ in chosen]


def _push(sequence: Sequence, answer: Answer, state: SamplerState, token: int, logprob: TokenLogprob | None) -> None:
    """The next token, and those that its grammar leaves no choice about: they are fed together in the next step."""

    def push(token_id: int, logprob: TokenLogprob | None = None) -> None:
        answer.push(token_id, logprob)
        state.append(token_id)
        sequence.tokens.append(token_id)

    push(token, logprob)
    for forced in state.forced(answer.left) if answer.reason is None else ():
        if answer.reason is None:
            push(forced)
    if state.complete:
        answer.end()


def extend_scores(wanted: list[tuple[SuffixChunk, int, int]], logits: torch.Tensor) -> list[Sequence]:
    """Add up the log-probabilities of choices; the sequences whose last row this was."""
    rows: list[int] = []
    places: list[tuple[Sequence, int]] = []
    for chunk, first, last in wanted:
        sequence = chunk.sequence
        if sequence.trie is None:
            continue
        # row of place -1 is the prompt's last token
        start = sequence.computed + chunk.first_output - sequence.prompt_length
        rows.extend(range(first, last))
        places.extend((sequence, start + offset) for offset in range(last - first))
    if not rows:
        return []
    if len(rows) < logits.shape[0]:
        logits = logits[torch.tensor(rows, device=logits.device)]
    targets = [sequence.trie.targets(place) if sequence.trie is not None else [] for sequence, place in places]
    for (sequence, place), values in zip(places, gather_logprobs(logits, targets), strict=True):
        if sequence.trie is not None:
            sequence.trie.add(sequence.sums, place, values)
    ended = (sequence for sequence, place in places if sequence.trie and place == len(sequence.trie.tokens) - 1)
    return list(dict.fromkeys(ended))
