"""`VllmEngine`: vLLM computes, in processes of its own; what a request means stays here.

An image's rows are validated by the loader, written to a file in memory, and mapped by vLLM's workers
(`lookonce.models.row_files`, `connector`). The file is there until the last request that was given it has ended. vLLM's
KV is keyed by tokens, image identifiers and salt, in blocks: `cached_tokens` are whole blocks.
"""

from __future__ import annotations

import asyncio
import math
import time
import uuid
import weakref
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Hashable, Sequence, Set
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import structlog
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from lm_service.engine.answer import Answer, TokenTable
from lm_service.engine.grammar import Matcher, too_complex
from lm_service.engine.packed.execution.choices import trie_of
from lm_service.engine.packed.options import PackedOptions
from lm_service.engine.packed.scheduling.sequence import check_generation, check_scoring
from lm_service.engine.types import (
    DamagedRecord,
    Delta,
    EmbeddingLoader,
    EmbeddingSource,
    EngineState,
    Finish,
    Generation,
    ImageSpan,
    ModelFacts,
    Prompt,
    ScoreItem,
    Scores,
    Scoring,
    Timings,
)
from lm_service.engine.vllm.identifiers import Identifiers
from lm_service.engine.vllm.requests import NamedImage, answer_params, engine_input, score_params, token_logprob
from lm_service.engine.vllm.statistics import Statistics
from lm_service.engine.vllm.turns import Firsts, Turns
from lm_service.metrics import METRICS
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.record import TensorView
from lookonce.core.tasks import end_tasks, start_task
from lookonce.models.row_files import RowDirectory, RowFile
from lookonce.models.self_check import SelfCheckFailed
from lookonce.models.tensors import tensor_of

RETRY_SECONDS = 1.0
LOOK_SECONDS = 0.5
"""So often it is looked whether vLLM's processes live."""
IDLE_SECONDS = 10.0
"""So long erasure waits for a moment without requests; then those under way are computed again from their beginning."""
TARGETS = 128
"""Tokens whose log-probabilities one request may ask for (vLLM 0.32)."""
PREFIXES = 10_000
T = TypeVar("T")
_log = structlog.get_logger(__name__)


class FiledRows:
    """An image's rows [tokens, width] in a file, which is removed when nobody holds this any more."""

    def __init__(self, file: RowFile) -> None:
        self.file = file
        weakref.finalize(self, file.remove)

    @property
    def nbytes(self) -> int:
        """Of the file."""
        return self.file.nbytes


@dataclass(frozen=True)
class PromptBounds:
    """What prompts are held to."""

    vocabulary: int
    position_rows: int
    row_width: int  # of an image's rows, with those of a deepstack
    image_id: int
    merge_size: int
    image_tokens: int  # of one image: more never fit vLLM's encoder cache
    block: int  # tokens of a block of KV
    batch_invariant: bool = False  # vLLM computes a row the same whatever is beside it (VLLM_BATCH_INVARIANT, on CUDA)


class _Job:
    """A request under way."""

    def __init__(self, client: str, deadline: float | None, answers: int) -> None:
        self.client, self.deadline, self.answers = client, deadline, answers
        self.arrived = time.monotonic()
        self.rows: list[FiledRows] = []  # held for as long as vLLM may want them

    def elapsed_ms(self) -> float:
        """Since the request arrived."""
        return (time.monotonic() - self.arrived) * 1000

    @property
    def seconds_left(self) -> float | None:
        """Until its deadline; None: there is none."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())


Event = Delta | Finish | LookonceError


class VllmEngine:
    """An `Engine`. `start` before use, `close` after."""

    def __init__(
        self,
        llm: AsyncLLM,
        statistics: Statistics,
        directory: RowDirectory,
        dtype: torch.dtype,
        table: TokenTable,
        end_ids: Set[int],
        context_length: int,
        bounds: PackedOptions,
        prompts: PromptBounds,
        facts: ModelFacts,
        check: Callable[[], Awaitable[None]],
    ) -> None:
        """`table` holds the vocabulary's text, `end_ids` the tokens that end an answer; of `bounds` those of requests
        count. `check` is awaited at start, and raises for a model that isn't what it should be."""
        self.facts, self._check = facts, check
        self._llm, self._statistics, self._directory, self._dtype = llm, statistics, directory, dtype
        self._table, self._end_ids, self._context = table, frozenset(end_ids), context_length
        self._bounds, self._prompts = bounds, prompts
        self._identifiers, self._turns, self._firsts = Identifiers(), Turns(), Firsts(PREFIXES)
        self._jobs: set[_Job] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loader: EmbeddingLoader  # from `start` on
        self._watch: asyncio.Task[None] | None = None
        self._cleaning: asyncio.Task[None] | None = None
        self._closing = True  # until it is started, and when vLLM has died
        self._on_failure: Callable[[], object] = lambda: None
        self._prefill_tokens = self._decode_tokens = self._hits = self._misses = 0

    async def start(self, loader: EmbeddingLoader, on_failure: Callable[[], object] = lambda: None) -> None:
        """See `Engine.start`."""
        await self._check()
        await self._warm_up()
        self._loader, self._on_failure, self._closing = loader, on_failure, False
        self._watch = start_task(self._watch_vllm())

    async def _warm_up(self) -> None:
        """Compute something with an image: what this model's kernels lack is found out before anybody asks. Raises
        SelfCheckFailed."""
        image = FiledRows(self._directory.write(torch.zeros(1, self._prompts.row_width, dtype=self._dtype)))
        grid = (1, self._prompts.merge_size, self._prompts.merge_size)
        given = engine_input([0, self._prompts.image_id, 0], [NamedImage(1, 1, grid, "warm-up", image.file)], None)
        try:
            async with aclosing(self._outputs(given, score_params([0]), _Job("", None, 1))) as outputs:
                await anext(outputs)
        except LookonceError as error:
            text = "vLLM can't compute with this model here: its log above says why; leave out --engine"
            raise SelfCheckFailed(text) from error

    async def close(self) -> None:
        self._closing = True
        await end_tasks(*(task for task in (self._watch, self._cleaning, *self._tasks) if task is not None))
        await asyncio.to_thread(self._llm.shutdown)
        self._directory.close()

    def describe(self) -> EngineState:
        """See `Engine.describe`."""
        stats, asked = self._statistics, sum(job.answers for job in self._jobs)
        return EngineState(
            self.facts,
            running=min(asked, self._bounds.max_running),
            waiting=max(0, asked - self._bounds.max_running),
            max_running=self._bounds.max_running,
            max_waiting=self._bounds.max_waiting,
            generated_tokens=self._decode_tokens,
            batch_invariant=self._prompts.batch_invariant,
            prefill_tokens=self._prefill_tokens,
            decode_tokens=self._decode_tokens,
            prefix_bytes=int(stats.usage * stats.kv_bytes),
            prefix_budget_bytes=stats.kv_bytes,
            prefix_hits=self._hits,
            prefix_misses=self._misses,
            preemptions=stats.preemptions,
            steps=stats.steps,
        )

    async def forget(self, keys: Sequence[bytes], image_digests: Sequence[bytes]) -> int:
        """What vLLM keeps of these images is unreachable at once, and dropped when nothing is computed, or else after
        `IDLE_SECONDS`."""
        gone = {*keys, *image_digests}
        self._identifiers.erase([*gone])
        dropped = self._firsts.forget(lambda prefix: isinstance(prefix, tuple) and bool(gone.intersection(prefix[1])))
        if self._cleaning is None or self._cleaning.done():
            self._cleaning = start_task(self._clean())
        return dropped

    async def generate(self, request: Generation) -> AsyncIterator[Delta | Finish]:
        check_generation(request, self._context, self._prompts, self._bounds)
        self._check_images(request.prompt)
        events: asyncio.Queue[Event] = asyncio.Queue()
        async with self._admitted(request.client, request.deadline, request.sampling.n) as job:
            work = self._task(self._answers(request, job, events))
            work.add_done_callback(lambda done: events.put_nowait(_ending(done)))
            unfinished = request.sampling.n
            try:
                while unfinished:
                    event = await _within(job, events.get())
                    if isinstance(event, LookonceError):
                        raise event
                    unfinished -= isinstance(event, Finish)
                    yield event
            finally:
                work.cancel()
                await asyncio.wait([work])  # vLLM has been told to give it up

    async def score(self, request: Scoring) -> Scores:
        check_scoring(request, self._context, self._prompts, self._bounds)
        for item in request.items:
            self._check_images(item.prompt)
        timings = Timings()
        async with self._admitted(request.client, request.deadline, len(request.items)) as job:
            work = self._task(self._scored(request, job, timings))
            try:
                await _within(job, asyncio.wait([work]))
                if work.cancelled():
                    raise _unavailable()
                found = _unwrapped(work)
            finally:
                work.cancel()
                await asyncio.wait([work])
        timings.total_ms = timings.ttft_ms = job.elapsed_ms()
        cached = tuple(count for _, count in found)
        timings.cached_tokens, timings.prefill_tokens = sum(cached), timings.prefill_tokens
        return Scores(tuple(tuple(sums) for sums, _ in found), cached, timings)

    # Admission

    @asynccontextmanager
    async def _admitted(self, client: str, deadline: float | None, answers: int) -> AsyncIterator[_Job]:
        """Raises OVERLOADED or UNAVAILABLE at once."""
        if self._closing:
            raise _unavailable()
        if sum(job.answers for job in self._jobs) >= self._bounds.max_running + self._bounds.max_waiting:
            METRICS.refusals.inc()
            text = f"{self._bounds.max_waiting} requests are waiting already"
            raise LookonceError(ErrorKind.OVERLOADED, text, retry_after=RETRY_SECONDS)
        job = _Job(client, deadline, answers)
        self._jobs.add(job)
        try:
            yield job
        finally:
            self._jobs.discard(job)
            job.rows.clear()

    def _priority(self, job: _Job) -> int:
        """vLLM takes the lowest first: who asks for little does not wait behind who asks for much."""
        return Counter(other.client for other in self._jobs)[job.client]

    def _check_images(self, prompt: Prompt) -> None:
        for span in prompt.images:
            if span.tokens > self._prompts.image_tokens:
                text = (
                    f"an image of {span.tokens} tokens: vLLM was started for {self._prompts.image_tokens} at most; "
                    "lower its bounds (max_pixels), or raise max_num_batched_tokens in --engine-args"
                )
                raise LookonceError(ErrorKind.CONTEXT_LENGTH_EXCEEDED, text, param="image")

    def _task(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = start_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # Images

    async def _named(self, prompt: Prompt, job: _Job, timings: Timings) -> list[NamedImage]:
        """The prompt's images, their rows in files that the job holds. Raises what the loader raises."""
        began, images = time.monotonic(), []
        for span in prompt.images:
            identifier = self._identifiers.of(span.reference)  # before its rows are asked for: an erasure between the
            rows, source = await self._loader.load(span.reference, self._filed)  # two makes them unreachable
            _check_rows(rows, span)
            job.rows.append(rows)
            timings.embedding = max(timings.embedding, source, key=list(EmbeddingSource).index)
            images.append(NamedImage(span.start, span.tokens, span.reference.grid_thw, identifier, rows.file))
        timings.load_ms += (time.monotonic() - began) * 1000
        return images

    def _filed(self, *views: TensorView) -> FiledRows:
        """A record's tensors [tokens, hidden] beside each other in a file, as vLLM's models take a deepstack. Raises
        DamagedRecord when they are not finite in the model's dtype."""
        rows = torch.cat([tensor_of(view).to(self._dtype) for view in views], dim=1)
        if not bool(torch.isfinite(rows).all()):  # after the cast: float16 may overflow
            raise DamagedRecord("embedding holds numbers that are not finite")
        try:
            return FiledRows(self._directory.write(rows))
        except OSError:
            _log.exception("row_file_failed")
            text = "there is no room in shared memory for an image's embedding; lower --tensor-cache-bytes"
            raise LookonceError(ErrorKind.OVERLOADED, text, retry_after=RETRY_SECONDS) from None

    # Answers

    async def _answers(self, request: Generation, job: _Job, events: asyncio.Queue[Event]) -> None:
        async with self._turns.shared():
            timings = Timings()
            images = await self._named(request.prompt, job, timings)
            async with asyncio.TaskGroup() as group:
                for index in range(request.sampling.n):
                    group.create_task(self._answer(request, job, images, replace(timings), index, events))

    async def _answer(
        self,
        request: Generation,
        job: _Job,
        images: Sequence[NamedImage],
        timings: Timings,
        index: int,
        events: asyncio.Queue[Event],
    ) -> None:
        prompt, sampling = request.prompt, request.sampling
        room = self._context - len(prompt.token_ids)
        answer = Answer(index, sampling, self._table, self._end_ids, room)
        matcher = sampling.grammar.matcher() if sampling.grammar is not None else None
        given = engine_input(prompt.token_ids, images, _salt(request.salt))
        params = answer_params(sampling, self._end_ids, index, room)
        async with self._firsts.turn(_prefix(prompt, request.salt)) as computed:
            stream = aclosing(self._outputs(given, params, job))
            outputs = await stream.__aenter__()
            try:
                output = await anext(outputs)
                computed()
            except BaseException:
                await stream.__aexit__(None, None, None)
                raise
        async with stream:
            self._count(prompt, output.num_cached_tokens or 0, timings, job)
            while True:
                self._take(answer, output, sampling.logprobs, matcher)
                if answer.reason is not None or not request.whole:
                    events.put_nowait(answer.take())
                if answer.reason is not None:
                    break
                output = await anext(outputs)
        timings.total_ms = job.elapsed_ms()
        events.put_nowait(Finish(index, answer.reason, len(answer.tokens), timings, answer.stop))

    def _take(self, answer: Answer, output: Any, wanted: int | None, matcher: Matcher | None) -> None:
        """The matcher follows what vLLM's own holds the answer to: it knows when the answer is complete."""
        completion = output.outputs[0]
        for place, token in enumerate(completion.token_ids):
            if answer.reason is not None:
                return
            logprob = None if wanted is None else token_logprob(token, completion.logprobs[place], wanted)
            answer.push(token, logprob)
            self._decode_tokens += 1
            if matcher is None:
                continue
            matcher.take(token)
            if matcher.failed:
                raise too_complex()
            if matcher.complete:
                answer.end()

    def _count(self, prompt: Prompt, cached: int, timings: Timings, job: _Job) -> None:
        """What was reused. vLLM finds whole blocks only: an image counts as there when no more than its last, unfilled
        block was computed again."""
        timings.ttft_ms = job.elapsed_ms()
        timings.cached_tokens, timings.prefill_tokens = cached, len(prompt.token_ids) - cached
        last = prompt.images[-1].end if prompt.images else self._prompts.block
        timings.prefix_hit = 0 < cached >= last // self._prompts.block * self._prompts.block
        if timings.prefix_hit and timings.embedding is EmbeddingSource.TENSOR_CACHE:
            timings.embedding = EmbeddingSource.NOT_NEEDED
        self._prefill_tokens += timings.prefill_tokens
        self._hits += timings.prefix_hit
        self._misses += not timings.prefix_hit

    async def _outputs(self, given: Any, params: SamplingParams, job: _Job) -> AsyncGenerator[Any, None]:
        """What vLLM yields. Raises UNAVAILABLE when it has died, INTERNAL for a request that it gives up."""
        try:
            async with aclosing(
                self._llm.generate(given, params, uuid.uuid4().hex, priority=self._priority(job))
            ) as outputs:
                async for output in outputs:
                    if output.outputs and output.outputs[0].finish_reason in ("error", "abort"):
                        raise LookonceError(ErrorKind.INTERNAL, "the engine could not compute this request")
                    if output.outputs and output.outputs[0].token_ids:
                        yield output
        except EngineDeadError:
            self._give_up()
            raise _unavailable() from None
        raise LookonceError(ErrorKind.INTERNAL, "the engine ended before the answer did")

    # Scores

    async def _scored(self, request: Scoring, job: _Job, timings: Timings) -> list[tuple[list[float], int]]:
        """Sums of each item's choices, and how many tokens of its prompt were reused."""
        if request.isolated and self._prompts.batch_invariant:
            async with asyncio.TaskGroup() as group:
                alone = [
                    group.create_task(self._scored_alone(item, request.salt, job, timings)) for item in request.items
                ]
            return [task.result() for task in alone]
        if request.isolated:
            return [await self._scored_alone(item, request.salt, job, timings) for item in request.items]
        async with self._turns.shared(), asyncio.TaskGroup() as group:
            work = [group.create_task(self._weighed(item, request.salt, job, timings)) for item in request.items]
        return [task.result() for task in work]

    async def _scored_alone(self, item: ScoreItem, salt: bytes, job: _Job, timings: Timings) -> tuple[list[float], int]:
        """With no KV of others, and with nothing else under way unless that changes nothing: the same numbers, whatever
        was asked before."""
        async with self._turns.shared() if self._prompts.batch_invariant else self._turns.alone():
            return await self._weighed(item, salt + uuid.uuid4().bytes, job, timings, one_by_one=True)

    async def _weighed(
        self, item: ScoreItem, salt: bytes, job: _Job, timings: Timings, *, one_by_one: bool = False
    ) -> tuple[list[float], int]:
        trie = trie_of(item.choices)
        images = await self._named(item.prompt, job, timings)
        sums = [0.0] * len(item.choices)
        first, cached = await self._after(item.prompt, images, (), list(trie.targets(-1)), salt, job)
        trie.add(sums, -1, first)
        own = Timings(embedding=timings.embedding)
        self._count(item.prompt, cached, own, job)
        timings.prefix_hit = own.prefix_hit
        timings.prefill_tokens += own.prefill_tokens
        if own.embedding is EmbeddingSource.NOT_NEEDED and timings.embedding is EmbeddingSource.TENSOR_CACHE:
            timings.embedding = EmbeddingSource.NOT_NEEDED
        limit = asyncio.Semaphore(1 if one_by_one else self._bounds.max_running)

        async def below(place: int) -> list[float]:
            fed = [trie.tokens[at] for at in reversed(trie.ancestors(place))]
            async with limit:
                found, _ = await self._after(item.prompt, images, fed, list(trie.targets(place)), salt, job)
            return found

        async with asyncio.TaskGroup() as group:
            work = [group.create_task(below(place)) for place in range(len(trie.tokens))]
        for place, task in enumerate(work):
            trie.add(sums, place, task.result())
        return sums, cached

    async def _after(
        self,
        prompt: Prompt,
        images: Sequence[NamedImage],
        fed: Sequence[int],
        targets: Sequence[int],
        salt: bytes,
        job: _Job,
    ) -> tuple[list[float], int]:
        """Log-probabilities of `targets` behind a prompt and what is fed after it, and how much of it was reused."""
        given = engine_input([*prompt.token_ids, *fed], images, _salt(salt))
        found: list[float] = []
        reused: int | None = None
        for start in range(0, len(targets), TARGETS):
            wanted = targets[start : start + TARGETS]
            async with (
                self._firsts.turn(_prefix(prompt, salt)) as computed,
                aclosing(self._outputs(given, score_params(wanted), job)) as outputs,
            ):
                output = await anext(outputs)
                computed()
            at_once = output.outputs[0].logprobs[0]
            found += [at_once[token].logprob for token in wanted]
            if reused is None:
                reused = output.num_cached_tokens or 0
        if not all(map(math.isfinite, found)):
            raise LookonceError(ErrorKind.INTERNAL, "the model's logits are not finite numbers")
        return found, reused or 0

    # Life of vLLM's processes

    async def _watch_vllm(self) -> None:
        while not self._closing:
            if self._llm.errored:
                self._give_up()
                return
            await asyncio.sleep(LOOK_SECONDS)

    def _give_up(self) -> None:
        if not self._closing:
            self._closing = True
            _log.error("vllm_died")
            self._on_failure()

    async def _clean(self) -> None:
        """Drop what vLLM keeps of erased images: with everything else, for it can't be told apart."""
        patience, computed_again = time.monotonic() + IDLE_SECONDS, False
        try:
            while not self._turns.idle:
                await asyncio.sleep(LOOK_SECONDS / 10)
                if not computed_again and time.monotonic() > patience:
                    computed_again = True
                    await self._llm.reset_prefix_cache(reset_running_requests=True)
            async with self._turns.alone():
                await self._llm.reset_prefix_cache()
                await self._llm.reset_encoder_cache()
        except EngineDeadError:
            self._give_up()


def _check_rows(rows: FiledRows, span: ImageSpan) -> None:
    if rows.file.tokens != span.reference.tokens:
        text = f"the embedding has {rows.file.tokens} rows, expected {span.reference.tokens}"
        raise LookonceError(ErrorKind.EMBEDDING_INVALID, text)


def _salt(salt: bytes) -> str | None:
    return salt.hex() or None


def _prefix(prompt: Prompt, salt: bytes) -> Hashable | None:
    """What a prompt up to its last image is known by: (salt and tokens, keys and digests of its images)."""
    if not prompt.images:
        return None
    names = [name for span in prompt.images for name in (span.reference.key, span.reference.image_digest)]
    return (salt, prompt.token_ids[: prompt.images[-1].end]), tuple(names)


async def _within(job: _Job, waiting: Coroutine[Any, Any, T]) -> T:
    """What is waited for. Raises DEADLINE_EXCEEDED."""
    try:
        async with asyncio.timeout(job.seconds_left):
            return await waiting
    except TimeoutError:
        raise LookonceError(ErrorKind.DEADLINE_EXCEEDED, "the request's time is up") from None


def _ending(done: asyncio.Task[Any]) -> LookonceError:
    """What a caller is told who still waits."""
    try:
        _unwrapped(done)
    except LookonceError as error:
        return error
    except asyncio.CancelledError:
        return _unavailable()
    return LookonceError(ErrorKind.INTERNAL, "the engine ended before the answer did")


def _unwrapped(done: asyncio.Task[T]) -> T:
    """The task's result, or the first error of ours within what it raised. What nobody foresaw is logged."""
    failure = done.exception()
    if failure is None:
        return done.result()
    inner: BaseException = failure
    while isinstance(inner, BaseExceptionGroup):
        inner = next((e for e in inner.exceptions if isinstance(e, LookonceError)), inner.exceptions[0])
    if isinstance(inner, LookonceError):
        raise inner
    _log.error("engine_failed", exc_info=inner)
    raise LookonceError(ErrorKind.INTERNAL, "the engine could not compute this request") from None


def _unavailable() -> LookonceError:
    return LookonceError(ErrorKind.UNAVAILABLE, "the engine is stopping", retry_after=RETRY_SECONDS)
