"""`PlainEngine`: one request after the other, each with the model's own cache, in one worker thread.

It keeps nothing from one request to the next: no prefix is shared, and there is nothing to forget. Sampling, stop
strings and log-probabilities are those of the packed engine.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import structlog
import torch

from lm_service.engine.answer import Answer, TokenTable
from lm_service.engine.grammar import too_complex
from lm_service.engine.packed.engine import rows_of
from lm_service.engine.packed.options import PackedOptions
from lm_service.engine.packed.scheduling.sequence import check_generation, check_scoring
from lm_service.engine.sampling import SamplerState, finite_rows, sample, token_logprobs
from lm_service.engine.types import (
    Delta,
    EmbeddingLoader,
    EmbeddingSource,
    EngineState,
    Finish,
    Generation,
    ModelFacts,
    Prompt,
    ScoreItem,
    Scores,
    Scoring,
    Timings,
)
from lm_service.metrics import METRICS
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.tasks import end_tasks, start_task
from lookonce.models.unbatched import ImageRows, UnbatchedModel, UnbatchedPrompt

AHEAD = 4
"""Requests whose embeddings are held: the one that is computed, and the next."""
FAULTS_IN_A_ROW = 3
"""So many faults without a success between them, and the engine is no longer usable."""
RETRY_SECONDS = 1.0
T = TypeVar("T")
Event = Delta | Finish | LookonceError
_log = structlog.get_logger(__name__)


class _Job:
    """A request's work, in whichever thread."""

    def __init__(self, deadline: float | None) -> None:
        self.deadline = deadline
        self.arrived = time.monotonic()
        self.begun = False  # in the worker thread
        self.over = False  # nobody wants more of it

    def elapsed_ms(self) -> float:
        """Since the request arrived."""
        return (time.monotonic() - self.arrived) * 1000

    def check(self) -> None:
        """Raise DEADLINE_EXCEEDED when there is no time left."""
        if self.deadline is not None and time.monotonic() >= self.deadline:
            raise _late()


class PlainEngine:
    """An `Engine`. `start` before use, `close` after."""

    def __init__(
        self,
        model: UnbatchedModel,
        table: TokenTable,
        end_ids: Set[int],
        context_length: int,
        bounds: PackedOptions,
        facts: ModelFacts,
    ) -> None:
        """`table` holds the vocabulary's text, `end_ids` the tokens that end an answer; of `bounds` those of requests
        count: how many may wait, and how many answers one may ask for."""
        self.facts = facts
        self._model, self._table, self._end_ids, self._bounds = model, table, end_ids, bounds
        self._context = context_length
        self._rows_of = partial(rows_of, device=model.shape.device, dtype=model.shape.dtype)
        self._loader: EmbeddingLoader  # from `start` on
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="plain-engine")
        self._ahead = asyncio.Semaphore(AHEAD)
        self._jobs: dict[asyncio.Task[Any], _Job] = {}  # requests
        self._computing = False
        self._loop: asyncio.AbstractEventLoop  # as well
        self._closing = True  # until it is started, and when a fault has left it unusable
        self._faults = 0  # in a row
        self._on_failure: Callable[[], object] = lambda: None
        self._prefill_tokens = self._decode_tokens = self._steps = 0
        self._seconds = 0.0

    async def start(self, loader: EmbeddingLoader, on_failure: Callable[[], object] = lambda: None) -> None:
        """See `Engine.start`."""
        self._loader, self._on_failure, self._closing = loader, on_failure, False
        self._loop = asyncio.get_running_loop()

    async def close(self) -> None:
        self._closing = True
        await end_tasks(*self._jobs)
        await asyncio.to_thread(self._pool.shutdown)

    def describe(self) -> EngineState:
        """See `Engine.describe`."""
        return EngineState(
            self.facts,
            running=int(self._computing),
            waiting=sum(not job.begun for job in self._jobs.values()),
            max_running=1,
            max_waiting=self._bounds.max_waiting,
            generated_tokens=self._decode_tokens,
            batch_invariant=True,  # no two requests share a step
            prefill_tokens=self._prefill_tokens,
            decode_tokens=self._decode_tokens,
            steps=self._steps,
            forward_seconds=self._seconds,
        )

    async def forget(self, keys: Sequence[bytes], image_digests: Sequence[bytes]) -> int:
        """Nothing is kept beyond a request."""
        return 0

    async def generate(self, request: Generation) -> AsyncIterator[Delta | Finish]:
        check_generation(request, self._context, self._model.shape, self._bounds)
        self._model.check(_prompt(request.prompt, ()))
        job, timings, events = _Job(request.deadline), Timings(), asyncio.Queue[Event]()
        loop = asyncio.get_running_loop()

        def put(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        compute = partial(self._answers, request, job, timings, put)
        task = self._admitted(job, self._in_turn(job, request.prompt, timings, compute))
        task.add_done_callback(lambda done: events.put_nowait(_ending(done)))
        unfinished = request.sampling.n
        try:
            while unfinished:
                event = await _next(events, job)
                if isinstance(event, LookonceError):
                    raise event
                unfinished -= isinstance(event, Finish)
                yield event
        finally:
            job.over = True
            task.cancel()

    async def score(self, request: Scoring) -> Scores:
        check_scoring(request, self._context, self._model.shape, self._bounds)
        for item in request.items:
            self._model.check(_prompt(item.prompt, ()))
        job, timings = _Job(request.deadline), Timings()
        task = self._admitted(job, self._scored(request, job, timings))
        try:
            timeout = None if job.deadline is None else max(0.0, job.deadline - time.monotonic())
            done, _ = await asyncio.wait([task], timeout=timeout)
            if not done:
                raise _late()
            if task.cancelled():
                raise _unavailable()
            sums = task.result()
        finally:
            job.over = True
            task.cancel()
        timings.total_ms = timings.ttft_ms = job.elapsed_ms()
        return Scores(tuple(sums), tuple(0 for _ in request.items), timings)

    async def _scored(self, request: Scoring, job: _Job, timings: Timings) -> list[tuple[float, ...]]:
        """Item by item: others' requests come between them."""
        return [
            await self._in_turn(job, item.prompt, timings, partial(self._weighed, item, job)) for item in request.items
        ]

    def _admitted(self, job: _Job, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """A request's task. Raises OVERLOADED or UNAVAILABLE at once."""
        refusal = _unavailable() if self._closing else None
        if len(self._jobs) > self._bounds.max_waiting:
            METRICS.refusals.inc()
            refusal = LookonceError(
                ErrorKind.OVERLOADED,
                f"{self._bounds.max_waiting} requests are waiting already",
                retry_after=RETRY_SECONDS,
            )
        if refusal is not None:
            work.close()
            raise refusal
        task = start_task(work)
        self._jobs[task] = job
        task.add_done_callback(self._jobs.pop)
        return task

    async def _in_turn(self, job: _Job, prompt: Prompt, timings: Timings, compute: Callable[[UnbatchedPrompt], T]) -> T:
        """What is computed in the worker thread, when it is the prompt's turn. Raises what the loader raises."""
        async with self._ahead:
            given = await self._loaded(prompt, timings)
            work = asyncio.get_running_loop().run_in_executor(self._pool, self._guarded, job, given, timings, compute)
            try:
                found = await asyncio.shield(work)
            except asyncio.CancelledError:
                job.over = True
                await asyncio.wait([work])  # its rows are held until then
                raise
        if isinstance(found, LookonceError):
            raise found
        return found

    async def _loaded(self, prompt: Prompt, timings: Timings) -> UnbatchedPrompt:
        began, images = time.monotonic(), []
        for span in prompt.images:
            rows, source = await self._loader.load(span.reference, self._rows_of)
            expected = [span.reference.tokens, self._model.shape.hidden]
            if list(rows.shape) != expected:
                raise LookonceError(
                    ErrorKind.EMBEDDING_INVALID, f"the embedding is {list(rows.shape)}, expected {expected}"
                )
            timings.embedding = max(timings.embedding, source, key=list(EmbeddingSource).index)
            images.append(ImageRows(span.reference.grid_thw, rows[span.first : span.first + span.tokens]))
        timings.load_ms += (time.monotonic() - began) * 1000
        return _prompt(prompt, images)

    def _give_up(self) -> None:
        self._closing = True
        self._on_failure()

    # The worker thread

    def _guarded(
        self, job: _Job, prompt: UnbatchedPrompt, timings: Timings, compute: Callable[[UnbatchedPrompt], T]
    ) -> T | LookonceError:
        """What is computed, or why it is not."""
        began, self._computing, job.begun = time.monotonic(), True, True
        if not timings.prefill_tokens:
            timings.queue_ms = job.elapsed_ms() - timings.load_ms
        timings.prefill_tokens += len(prompt.token_ids)
        try:
            job.check()
            found = compute(prompt) if not job.over else _unavailable()
        except LookonceError as error:
            return error
        except Exception:  # noqa: BLE001 - logged; only this request is told
            _log.exception("engine_failed")
            self._faults += 1
            if self._faults == FAULTS_IN_A_ROW:
                self._loop.call_soon_threadsafe(self._give_up)
            return LookonceError(ErrorKind.INTERNAL, "the engine could not compute this request")
        finally:
            self._computing = False
            self._seconds += time.monotonic() - began
        self._faults = 0
        return found

    def _answers(
        self,
        request: Generation,
        job: _Job,
        timings: Timings,
        put: Callable[[Event], None],
        prompt: UnbatchedPrompt,
    ) -> None:
        """One after the other; `put` is given their events."""
        sampling, begun = request.sampling, self._model.begin(prompt)
        self._prefill_tokens += len(prompt.token_ids)
        for index in range(sampling.n):
            answer = Answer(index, sampling, self._table, self._end_ids, self._context - len(prompt.token_ids))
            state = SamplerState(sampling, prompt.token_ids, index, self._end_ids)
            own = replace(timings)
            self._model.generate(begun, partial(self._chosen, request, job, own, put, answer, state))
            if job.over:
                return

    def _chosen(
        self,
        request: Generation,
        job: _Job,
        timings: Timings,
        put: Callable[[Event], None],
        answer: Answer,
        state: SamplerState,
        logits: torch.Tensor,
    ) -> tuple[int, bool]:
        """The next token of an answer, and whether it is the last."""
        job.check()
        if job.over:
            return 0, True
        row = _finite(logits)
        [token] = sample(row, [state])
        [logprob] = token_logprobs(row, [token], [state])
        state.append(token)
        if state.failed:
            raise too_complex()
        answer.push(token, logprob)
        if state.complete:
            answer.end()
        self._steps += 1
        self._decode_tokens += 1
        if len(answer.tokens) == 1:
            timings.ttft_ms = job.elapsed_ms()
        if answer.reason is not None or not request.whole:
            put(answer.take())
        if answer.reason is not None:
            timings.total_ms = job.elapsed_ms()
            put(Finish(answer.index, answer.reason, len(answer.tokens), timings, answer.stop))
        return token, answer.reason is not None

    def _weighed(self, item: ScoreItem, job: _Job, prompt: UnbatchedPrompt) -> tuple[float, ...]:
        """The log-probability of each choice. Of choices that begin alike the beginning is fed once: all of one token
        need nothing but the prompt."""
        begun, after = self._model.begin(prompt), dict[tuple[int, ...], torch.Tensor]()
        self._prefill_tokens += len(prompt.token_ids)
        for fed in sorted({choice[:-1] for choice in item.choices}, key=len, reverse=True):
            if fed not in after:
                self._model.generate(begun, partial(self._fed, job, fed, iter(range(len(fed) + 1)), after))
            if job.over:
                return ()
        return tuple(
            math.fsum(float(after[choice[:at]][token]) for at, token in enumerate(choice)) for choice in item.choices
        )

    def _fed(
        self,
        job: _Job,
        fed: tuple[int, ...],
        places: Iterator[int],
        after: dict[tuple[int, ...], torch.Tensor],
        logits: torch.Tensor,
    ) -> tuple[int, bool]:
        """The next of the tokens that are fed; `after` is given the log-probabilities behind those so far."""
        job.check()
        at = next(places)
        self._steps += 1
        after[fed[:at]] = _finite(logits)[0].float().log_softmax(-1)
        return (0, True) if at == len(fed) or job.over else (fed[at], False)


def _prompt(prompt: Prompt, images: Sequence[ImageRows]) -> UnbatchedPrompt:
    return UnbatchedPrompt(prompt.token_ids, images, prompt.text)


def _finite(logits: torch.Tensor) -> torch.Tensor:
    """As a row [1, vocabulary]. Raises INTERNAL."""
    row = logits[None]
    if not finite_rows(row)[0]:
        raise LookonceError(ErrorKind.INTERNAL, "the model's logits are not finite numbers")
    return row


async def _next(events: asyncio.Queue[Event], job: _Job) -> Event:
    if job.deadline is None or not events.empty():
        return await events.get()
    try:
        async with asyncio.timeout(max(0.0, job.deadline - time.monotonic())):
            return await events.get()
    except TimeoutError:
        raise _late() from None


def _ending(done: asyncio.Task[Any]) -> LookonceError:
    """What a caller is told who still waits."""
    failure = None if done.cancelled() else done.exception()
    return failure if isinstance(failure, LookonceError) else _unavailable()


def _late() -> LookonceError:
    return LookonceError(ErrorKind.DEADLINE_EXCEEDED, "the deadline passed before the answer was complete")


def _unavailable() -> LookonceError:
    return LookonceError(ErrorKind.UNAVAILABLE, "the engine is shutting down", retry_after=RETRY_SECONDS)
