"""`PooledEngine`: whole prompts in packed steps, one after the other in a worker thread.

A request has one group of prompts in the queue at a time, no larger than a step: so requests take turns, and no more
embeddings are held than the steps under way need.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from lm_service.engine.packed.engine import RETRY_SECONDS, checked_rows, rows_of
from lm_service.engine.packed.engine_core import internal_error
from lm_service.engine.packed.options import PackedOptions
from lm_service.engine.packed.scheduling.batch import StepBudget
from lm_service.engine.types import (
    Delta,
    EmbeddingLoader,
    EmbeddingSource,
    EngineState,
    Finish,
    Generation,
    ModelFacts,
    Prompt,
    Scores,
    Scoring,
    Timings,
    VectorRequest,
    Vectors,
)
from lm_service.engine.vectors.forward import Filled, vectors_of
from lm_service.metrics import METRICS
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.tasks import end_tasks, start_task
from lookonce.models.text_adapter import ModelAdapter
from lookonce.models.vector_layout import Pooling

_log = structlog.get_logger(__name__)
Found = NDArray[np.float32] | LookonceError


@dataclass(eq=False)
class _Group:
    """Prompts of one request that are computed in one step."""

    filled: list[Filled]
    done: asyncio.Future[list[Found]] = field(repr=False)
    began: float = 0.0  # monotonic seconds

    @property
    def tokens(self) -> int:
        return sum(one.length for one in self.filled)


class PooledEngine:
    """A `VectorEngine`. `start` before use, `close` after."""

    def __init__(
        self,
        model: ModelAdapter,
        pooling: Pooling,
        options: PackedOptions | None = None,
        facts: ModelFacts | None = None,
    ) -> None:
        self._model, self._pooling = model, pooling
        self.options = options or PackedOptions()
        self._facts = facts or ModelFacts()
        self._rows_of = partial(rows_of, device=model.shape.device, dtype=model.shape.dtype)
        self._budget = StepBudget(self.options)
        self._loader: EmbeddingLoader  # from `start` on
        self._on_failure: Callable[[], object] = lambda: None
        self._queue: deque[_Group] = deque()
        self._arrived: asyncio.Event
        self._worker: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vectors")
        self._state = EngineState(max_waiting=self.options.max_waiting)
        self._waiting = 0
        self._closing = False

    async def start(self, loader: EmbeddingLoader, on_failure: Callable[[], object] = lambda: None) -> None:
        """See `Engine.start`."""
        self._loader, self._on_failure, self._arrived = loader, on_failure, asyncio.Event()
        self._worker = start_task(self._work(), awaited=False)

    async def close(self) -> None:
        """See `Engine.close`: the step under way ends."""
        self._closing = True
        if self._worker is not None:
            await end_tasks(self._worker)
        for group in self._queue:
            _tell(group, [_unavailable()] * len(group.filled))
        self._queue.clear()
        await asyncio.to_thread(self._thread.shutdown)

    def describe(self) -> EngineState:
        """See `Engine.describe`; as of the latest step."""
        waiting = min(self._waiting, len(self._queue))
        return replace(self._state, model=self._facts, waiting=waiting, running=self._waiting - waiting)

    def generate(self, request: Generation) -> AsyncIterator[Delta | Finish]:
        """Refused."""
        raise _writes_no_text()

    async def score(self, request: Scoring) -> Scores:
        """Refused."""
        raise _writes_no_text()

    async def forget(self, keys: Sequence[bytes], image_digests: Sequence[bytes]) -> int:
        """Nothing is kept."""
        return 0

    async def embed(self, request: VectorRequest) -> Vectors:
        """See `VectorEngine.embed`."""
        if self._closing or self._worker is None or self._worker.done():
            raise _unavailable()
        if self._waiting >= self.options.max_waiting:
            METRICS.refusals.inc()
            text = f"{self.options.max_waiting} requests are waiting already"
            raise LookonceError(ErrorKind.OVERLOADED, text, retry_after=RETRY_SECONDS)
        timings, entered = Timings(), time.monotonic()
        self._waiting += 1
        left = None if request.deadline is None else max(0.0, request.deadline - entered)
        try:
            async with asyncio.timeout(left):
                found = await self._all(request.prompts, timings, entered)
        except TimeoutError:
            text = "the deadline passed before all vectors were computed"
            raise LookonceError(ErrorKind.DEADLINE_EXCEEDED, text) from None
        finally:
            self._waiting -= 1
        timings.total_ms = timings.ttft_ms = (time.monotonic() - entered) * 1000
        return Vectors(tuple(found), timings)

    async def _all(self, prompts: Sequence[Prompt], timings: Timings, entered: float) -> list[Found]:
        """Group after group, each as large as a step is now."""
        found: list[Found] = []
        while len(found) < len(prompts):
            group = self._next_group(prompts[len(found) :])
            found += await self._computed(group, timings, entered)
        return found

    def _next_group(self, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
        room = self._budget.tokens(0)
        for count, prompt in enumerate(prompts):
            room -= len(prompt.token_ids)
            if room < 0:
                return prompts[: max(1, count)]
        return prompts

    async def _computed(self, prompts: Sequence[Prompt], timings: Timings, entered: float) -> list[Found]:
        began = time.monotonic()
        loaded = await asyncio.gather(*(self._filled(prompt, timings) for prompt in prompts))
        timings.load_ms += (time.monotonic() - began) * 1000
        group = _Group([one for one in loaded if isinstance(one, Filled)], asyncio.get_running_loop().create_future())
        results: list[Found] = []
        if group.filled:
            self._queue.append(group)
            self._arrived.set()
            results = await group.done
            timings.queue_ms = timings.queue_ms or (group.began - entered) * 1000
            timings.prefill_tokens += group.tokens
        rest = iter(results)
        return [one if isinstance(one, LookonceError) else next(rest) for one in loaded]

    async def _filled(self, prompt: Prompt, timings: Timings) -> Filled | LookonceError:
        """The prompt with its embeddings, or why it has none."""
        rows: list[torch.Tensor] = []
        try:
            for span in prompt.images:
                tensor, tier = await self._loader.load(span.reference, self._rows_of)
                rows.append(checked_rows(tensor, span.reference, self._model.shape))
                timings.embedding = max(timings.embedding, tier, key=list(EmbeddingSource).index)
        except LookonceError as error:
            return error
        except Exception:  # noqa: BLE001 - whatever a loader raises ends this prompt, and no other
            _log.exception("embedding_load_failed")
            return internal_error()
        return Filled(prompt, tuple(rows))

    # The worker

    async def _work(self) -> None:
        try:
            while True:
                await self._arrived.wait()
                if groups := self._take():
                    await self._step(groups)
                else:
                    self._arrived.clear()
        except Exception:  # noqa: BLE001 - the worker's end: logged, and the process is told to end
            _log.exception("engine_unusable")
            for group in self._queue:
                _tell(group, [_unavailable()] * len(group.filled))
            self._on_failure()

    def _take(self) -> list[_Group]:
        """The next groups that fit into a step, those given up left out."""
        room, groups = self._budget.tokens(0), list[_Group]()
        while self._queue and (not groups or self._queue[0].tokens <= room):
            group = self._queue.popleft()
            if not group.done.done():
                groups.append(group)
                room -= group.tokens
        return groups

    async def _step(self, groups: Sequence[_Group]) -> None:
        began = time.monotonic()
        for group in groups:
            group.began = began
        filled = [one for group in groups for one in group.filled]
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._thread, self._compute, filled)
        except BaseException:
            for group in groups:
                _tell(group, [_unavailable()] * len(group.filled))
            raise
        rest = iter(found)
        for group in groups:
            _tell(group, [next(rest) for _ in group.filled])

    def _compute(self, filled: Sequence[Filled]) -> list[Found]:
        """In the worker thread. If a step fails, its prompts one by one: only what can't be computed fails. Raises what
        a device raises that computes nothing any more."""
        began = time.perf_counter()
        try:
            found = self._checked(filled)
        except Exception:  # noqa: BLE001 - logged; each prompt is tried again on its own
            _log.exception("step_failed", prompts=len(filled))
            found = [self._alone(one) for one in filled]
            for stage in self._model.shape.stages:
                torch.ones((), device=stage.device).add(1).item()
        seconds, tokens = time.perf_counter() - began, sum(one.length for one in filled)
        self._budget.note(tokens, 0, seconds)
        METRICS.step_seconds.observe(seconds)
        state = self._state
        self._state = replace(
            state,
            prefill_tokens=state.prefill_tokens + tokens,
            steps=state.steps + 1,
            forward_seconds=state.forward_seconds + seconds,
        )
        return found

    def _alone(self, one: Filled) -> Found:
        try:
            return self._checked([one])[0]
        except Exception:  # noqa: BLE001 - logged; who asked for it is told
            _log.exception("prompt_failed")
            return internal_error()

    def _checked(self, filled: Sequence[Filled]) -> list[Found]:
        found = vectors_of(self._model, self._pooling, filled)
        return [vectors if np.isfinite(vectors).all() else internal_error() for vectors in found]


def _tell(group: _Group, found: list[Found]) -> None:
    if not group.done.done():
        group.done.set_result(found)


def _unavailable() -> LookonceError:
    return LookonceError(ErrorKind.UNAVAILABLE, "the engine is shutting down", retry_after=RETRY_SECONDS)


def _writes_no_text() -> LookonceError:
    text = "this is an embedding model, which writes no text: ask /v1/embeddings, or start a chat model for answers"
    return LookonceError(ErrorKind.UNSUPPORTED, text, param="model")
