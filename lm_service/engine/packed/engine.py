"""`PackedEngine`: the engine's asyncio face. One worker thread computes; requests go in, events come out in batches."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence, Set
from dataclasses import replace
from functools import partial

import structlog
import torch

from lm_service.engine.answer import TokenTable
from lm_service.engine.packed.engine_core import Admitted, EngineCore, Event, Scored, internal_error
from lm_service.engine.packed.options import PackedOptions
from lm_service.engine.packed.scheduling import sequence as packed
from lm_service.engine.packed.scheduling.batch import PrefixPrefill
from lm_service.engine.packed.scheduling.scored_questions import score_sequences, scores_of
from lm_service.engine.packed.self_check import is_batch_invariant
from lm_service.engine.types import (
    DamagedRecord,
    Delta,
    EmbeddingLoader,
    EmbeddingSource,
    EngineState,
    Finish,
    Generation,
    ModelFacts,
    Scores,
    Scoring,
)
from lm_service.metrics import METRICS
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.identity import EmbeddingReference
from lookonce.core.record import TensorView
from lookonce.core.tasks import gather_or_end, start_task
from lookonce.models.tensors import tensor_of
from lookonce.models.text_adapter import ModelAdapter, ModelShape

_HAND_OVER_SECONDS = 0.02
RETRY_SECONDS = 1.0  # until who was refused may be let in
FAULTS_IN_A_ROW = 3
"""So many faults without a step between them, and the engine is no longer usable."""
_log = structlog.get_logger(__name__)


class _Stream:
    """Events of one request on their way to its caller."""

    def __init__(self, request: packed.Request) -> None:
        self.request = request
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.waiting = True


class PackedEngine:
    """An `Engine` for many questions over shared prefixes. `start` before use, `close` after."""

    def __init__(
        self,
        model: ModelAdapter,
        table: TokenTable,
        end_ids: Set[int],
        options: PackedOptions | None = None,
        facts: ModelFacts | None = None,
    ) -> None:
        """`table` holds the vocabulary's text, `end_ids` the tokens that end an answer."""
        self.options = options or PackedOptions()
        self._facts = facts or ModelFacts()
        self._shape = model.shape
        self._rows_of = partial(rows_of, device=model.shape.device, dtype=model.shape.dtype)
        self._question_prefixes_from = self.options.question_prefixes_from(model.shape.device.type)
        self._context = self.options.context_tokens or model.shape.context
        self._table, self._end_ids = table, end_ids
        self._loader: EmbeddingLoader  # from `start` on
        self._core = EngineCore(model, self.options, self._ask_for_embeddings)
        self._mailbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[packed.Request, _Stream] = {}
        self._waiting = 0  # requests that have no place yet
        self._admitted = 0  # sequences that have one
        self._outbox: deque[tuple[packed.Request, Event]] = deque()  # from the worker thread to the event loop
        self._timed = False  # a delivery is on its way
        self._state = self._core.state()
        self._tasks: set[asyncio.Task[None]] = set()
        self._model = model
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closing = False
        self._on_failure: Callable[[], object] = lambda: None
        self.failed = False  # the worker thread has ended for a fault: the engine is unusable
        self._faults = 0  # since the latest step
        self._forgetting: set[asyncio.Future[int]] = set()

    async def start(self, loader: EmbeddingLoader, on_failure: Callable[[], object] = lambda: None) -> None:
        """See `Engine.start`: the worker thread begins, and finds out what the products depend on."""
        self._loader, self._on_failure = loader, on_failure
        self._loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        self._thread = threading.Thread(target=self._work, args=(ready,), name="packed-engine", daemon=True)
        self._thread.start()
        await ready.wait()

    async def close(self) -> None:
        if self._closing or self._thread is None:
            return
        self._closing = True
        self._tell(lambda: None)
        await asyncio.to_thread(self._thread.join)
        for task in list(self._tasks):
            task.cancel()
        self._outbox.extend((request, _unavailable()) for request in self._streams)
        self._deliver()

    def describe(self) -> EngineState:
        """See `Engine.describe`; as of the latest step."""
        return replace(self._state, model=self._facts)

    async def generate(self, request: Generation) -> AsyncIterator[Delta | Finish]:
        packed.check_generation(request, self._context, self._shape, self.options)
        inner = packed.answers_to(
            request,
            self._table,
            self._end_ids,
            self._context,
            kept=self.options.keep_answers,
            prefix_reuse=self._shape.prefix_reuse,
        )
        unfinished = request.sampling.n
        async with contextlib.aclosing(self._events(inner, request.deadline)) as events:
            async for event in events:
                if not isinstance(event, Delta | Finish):
                    continue
                unfinished -= isinstance(event, Finish)
                if not unfinished:
                    inner.unfinished = 0  # nothing is left to cancel
                yield event
                if not unfinished:
                    return

    async def score(self, request: Scoring) -> Scores:
        packed.check_scoring(request, self._context, self._shape, self.options)
        exclusive = request.isolated and not self._core.batch_invariant
        sequences = score_sequences(
            request,
            exclusive=exclusive,
            worth=self._question_prefixes_from,
            longest=self.options.long_suffix_tokens,
            prefix_reuse=self._shape.prefix_reuse,
        )
        parts = dict.fromkeys(sequence.request for sequence in sequences)
        await gather_or_end([self._scored(part, request.deadline) for part in parts])
        return scores_of(sequences)

    async def _scored(self, request: packed.Request, deadline: float | None) -> None:
        async with contextlib.aclosing(self._events(request, deadline)) as events:
            async for event in events:
                if isinstance(event, Scored):
                    return

    async def forget(self, keys: Sequence[bytes], image_digests: Sequence[bytes]) -> int:
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        wanted = (frozenset(keys), frozenset(image_digests))

        def drop() -> None:
            try:
                count = self._core.forget(*wanted)
                self._state = self._core.state()
            except Exception:  # told; the thread sees to the rest
                self._call_loop(lambda: None if done.done() else done.set_exception(internal_error()))
                raise
            self._call_loop(lambda: None if done.done() else done.set_result(count))

        if self._closing or self.failed or self._thread is None:
            return self._core.forget(*wanted)
        self._forgetting.add(done)
        try:
            self._tell(drop)
            return await done
        finally:
            self._forgetting.discard(done)

    async def _events(self, request: packed.Request, deadline: float | None) -> AsyncGenerator[Event, None]:
        """Submit a request and yield its events; leaving early cancels it within a step."""
        if self._closing or self.failed or self._thread is None:
            raise _unavailable()
        # a request on its way to a free place does not count as waiting
        if self._waiting >= self.options.max_waiting + max(0, self.options.max_running - self._admitted):
            METRICS.refusals.inc()
            raise LookonceError(
                ErrorKind.OVERLOADED,
                f"{self.options.max_waiting} requests are waiting already",
                retry_after=RETRY_SECONDS,
            )
        stream = self._streams[request] = _Stream(request)
        self._waiting += 1
        request.unfinished = len(request.sequences)
        self._tell(lambda: self._core.enqueue(request))
        try:
            while True:
                event = await _next(stream, deadline)
                if isinstance(event, LookonceError):
                    raise LookonceError(event.kind, event.message, param=event.param, retry_after=event.retry_after)
                yield event
        finally:
            if stream.waiting:
                self._waiting -= 1
            else:
                self._admitted -= len(request.sequences)
            del self._streams[request]
            if request.unfinished:
                self._tell(lambda: self._core.cancel(request))
            else:
                request.sequences.clear()  # they know it: else both, and their prompts, stay until garbage is collected

    def _tell(self, command: Callable[[], None]) -> None:
        self._mailbox.put(command)

    def _call_loop(self, call: Callable[[], object]) -> None:
        """Run something on the event loop, unless that has been closed meanwhile."""
        with contextlib.suppress(RuntimeError):
            if self._loop is not None:
                self._loop.call_soon_threadsafe(call)

    def _deliver_soon(self) -> None:
        asyncio.get_running_loop().call_later(_HAND_OVER_SECONDS, self._deliver)

    def _deliver(self) -> None:
        self._timed = False
        events = [self._outbox.popleft() for _ in range(len(self._outbox))]
        for request, event in _merged(events):
            stream = self._streams.get(request)
            if stream is None:
                continue
            if not isinstance(event, Admitted):
                stream.events.put_nowait(event)
            elif stream.waiting:
                stream.waiting = False
                self._waiting -= 1
                self._admitted += len(request.sequences)

    # The worker thread

    def _work(self, ready: asyncio.Event) -> None:
        busy = False
        if self.options.batch_invariant is None and self._core.may_be_invariant:
            self._core.batch_invariant = is_batch_invariant(self._model, self.options)
            self._state = self._core.state()
        self._call_loop(ready.set)
        try:
            while not self._closing:
                busy = self._turn(busy)
            self._core.fail_all(_unavailable())
            self._post()
        except Exception:  # noqa: BLE001 - the thread's end: logged, and everybody is told
            _log.exception("engine_unusable")
            self._call_loop(self._give_up)

    def _turn(self, busy: bool) -> bool:
        """Mail, a step, and what came of it; whether there may be more to compute. Raises when a fault has left the
        engine unusable."""
        try:
            self._read_mail(wait=not busy)
            busy = self._core.step()
            if busy:
                self._faults = 0
                METRICS.step_seconds.observe(self._core.last_step_seconds)
            self._post()
        except Exception:  # logged; nobody knows how far it came, so all requests are told
            _log.exception("engine_failed")
            self._faults += 1
            if self._faults >= FAULTS_IN_A_ROW:
                raise
            self._core.check_devices()  # an error that stays: no further request is to meet it
            taken = [stream for stream in list(self._streams.values()) if stream.request.taken]
            self._core.fail_all(internal_error())
            self._post()
            self._call_loop(lambda: _fail(taken, internal_error()))  # also those that were between two places
            return False
        return busy

    def _read_mail(self, *, wait: bool) -> None:
        if wait:
            self._mailbox.get()()
        with contextlib.suppress(queue.Empty):
            while True:
                self._mailbox.get_nowait()()

    def _post(self) -> None:
        """Hand over what came of a step: first tokens and ends at once, the tokens between within 20 ms, so that a step
        of a few milliseconds does not wake every caller."""
        core = self._core
        self._state = core.state()
        self._outbox.extend(core.events)
        if core.urgent:
            self._call_loop(self._deliver)
        elif core.events and not self._timed:
            self._timed = True
            self._call_loop(self._deliver_soon)
        core.events, core.urgent = [], False

    def _ask_for_embeddings(self, prefill: PrefixPrefill) -> None:
        self._call_loop(lambda: self._start_loading(prefill))

    # Back on the event loop

    def _give_up(self) -> None:
        self.failed = True
        _fail(self._streams.values(), _unavailable())
        for done in self._forgetting:
            if not done.done():
                done.set_exception(_unavailable())
        self._on_failure()

    def _start_loading(self, prefill: PrefixPrefill) -> None:
        task = start_task(self._load(prefill), awaited=False, context=prefill.context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _load(self, prefill: PrefixPrefill) -> None:
        began = time.monotonic()
        rows: list[torch.Tensor] = []
        source = EmbeddingSource.NONE
        try:
            for span in prefill.node.images:
                tensor, tier = await self._loader.load(span.reference, self._rows_of)
                rows.append(checked_rows(tensor, span.reference, self._shape))
                source = max(source, tier, key=list(EmbeddingSource).index)
        except LookonceError as error:
            failure = error
        except Exception:  # noqa: BLE001 - whatever a loader raises ends those who wait for it, and only them
            _log.exception("embedding_load_failed")
            failure = internal_error()
        else:
            prefill.rows = list(zip(prefill.node.images, rows, strict=True))
            load_ms = (time.monotonic() - began) * 1000
            self._tell(lambda: self._core.scheduler.loaded(prefill, source, load_ms))
            return
        self._tell(lambda: self._core.scheduler.fail_prefill(prefill, failure))


def checked_rows(rows: torch.Tensor, reference: EmbeddingReference, shape: ModelShape) -> torch.Tensor:
    """What `rows_of` made, as [1 + deepstack, tokens, hidden]. Raises EMBEDDING_INVALID for rows of another shape than
    the prompt was laid out for."""
    stacked = rows if rows.dim() == 3 else rows[None]
    expected = [1 + shape.deepstack, reference.tokens, shape.hidden]
    if list(stacked.shape) != expected:
        raise LookonceError(
            ErrorKind.EMBEDDING_INVALID,
            f"the embedding is {list(rows.shape)}, expected {expected if shape.deepstack else expected[1:]}",
        )
    return stacked


def rows_of(*views: TensorView, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A record's rows in memory of their own: those of one tensor [tokens, hidden], of n [n, tokens, hidden]. Raises
    DamagedRecord when they are not finite in this dtype."""
    alone = len(views) == 1 and device.type == "cpu"
    first, *further = (tensor_of(view).to(dtype=dtype, copy=alone) for view in views)
    rows = torch.stack([first, *further]) if further else first
    # After the cast, for float16 may overflow; on the CPU, for a GPU would have to finish its step first.
    if not bool(torch.isfinite(rows).all()):
        raise DamagedRecord("embedding holds numbers that are not finite")
    return rows.to(device)


def _merged(events: Iterable[tuple[packed.Request, Event]]) -> list[tuple[packed.Request, Event]]:
    """The same with the tokens of each answer in one delta."""
    kept: list[tuple[packed.Request, Event]] = []
    places: dict[tuple[packed.Request, int], int] = {}
    for request, event in events:
        if isinstance(event, Delta):
            place = places.setdefault((request, event.index), len(kept))
            if place < len(kept):
                earlier = kept[place][1]
                if isinstance(earlier, Delta):
                    kept[place] = request, earlier.followed_by(event)
                continue
        kept.append((request, event))
    return kept


def _fail(streams: Iterable[_Stream], error: LookonceError) -> None:
    for stream in streams:
        stream.events.put_nowait(error)


async def _next(stream: _Stream, deadline: float | None) -> Event:
    if deadline is None or not stream.events.empty():
        return await stream.events.get()
    try:
        async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
            return await stream.events.get()
    except TimeoutError:
        raise LookonceError(ErrorKind.DEADLINE_EXCEEDED, "the deadline passed before the answer was complete") from None


def _unavailable() -> LookonceError:
    return LookonceError(ErrorKind.UNAVAILABLE, "the engine is shutting down", retry_after=RETRY_SECONDS)
