"""The engine's own thread of control, without the thread: enqueue, cancel, step. Everything here runs in one thread.

`step` reads: schedule, run, postprocess. What comes out is collected as events, for the facade to deliver at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

import structlog
import torch

from lm_service.engine.grammar import too_complex
from lm_service.engine.packed.execution.runner import (
    Runner,
    extend_answers,
    extend_scores,
    outputs,
    split_bad,
    work_clock,
)
from lm_service.engine.packed.options import PackedOptions
from lm_service.engine.packed.prefix_cache.pool import SuffixPool
from lm_service.engine.packed.prefix_cache.states import StatePool
from lm_service.engine.packed.prefix_cache.tree import PrefixCache
from lm_service.engine.packed.scheduling.batch import Batch, PrefixPrefill
from lm_service.engine.packed.scheduling.scheduler import Scheduler
from lm_service.engine.packed.scheduling.sequence import Request, Sequence, Status
from lm_service.engine.types import Delta, EngineState, Finish
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.models.devices import free_memory
from lookonce.models.text_adapter import ModelAdapter, ModelShape

_log = structlog.get_logger(__name__)


class Admitted:
    """Event: a request's first sequence left the queue."""


class Scored:
    """Event: a request's questions are all scored; their sequences hold the sums."""


Event = Delta | Finish | Admitted | Scored | LookonceError


def internal_error() -> LookonceError:
    """The one text for faults of our own; what happened is in the log."""
    return LookonceError(ErrorKind.INTERNAL, "the engine could not compute this request")


class EngineCore:
    """Pool, cache, scheduler and runner of one model."""

    def __init__(self, model: ModelAdapter, options: PackedOptions, load: Callable[[PrefixPrefill], None]) -> None:
        """`load` is told of prefills that want embeddings."""
        free = _free_for_kv(model.shape)
        self.options = options
        self._stages = model.shape.stages
        self.events: list[tuple[Request, Event]] = []
        self.urgent = False  # there are others among them than tokens that follow an answer's first
        running = options.budget("kv_bytes", free)
        self.states = StatePool(model.shape, running // 2, options.max_running)
        self.pool = SuffixPool(model.shape, running - self.states.bytes, options.slab_tokens)
        self.cache = PrefixCache(model.shape, options.budget("prefix_bytes", free))
        self._runner = Runner(model, self.pool, native=options.native)
        self.native = self._runner.native
        """Whether compiled kernels attend: what they compute for a token depends on none that it does not see."""
        self.scheduler = Scheduler(
            model.shape, self.pool, self.states, self.cache, options, native=self.native, load=load, fail=self._failed
        )
        self.may_be_invariant = self.native and not model.shape.states
        """Whether a row of a step can be the same whatever else is in it. A recurrent state depends on where a prefill
        was cut, in its last bits."""
        self.batch_invariant = bool(options.batch_invariant) and self.may_be_invariant
        self.steps = 0
        self.step_seconds = self.last_step_seconds = 0.0
        self._work = work_clock(model.shape.device)
        self._generated = 0

    def enqueue(self, request: Request) -> None:
        """Let a request's sequences wait."""
        request.taken, request.unfinished = True, len(request.sequences)
        # those that need not wait for another's prefix go first
        for sequence in sorted(request.sequences, key=lambda one: one.follows):
            self.scheduler.add(sequence)

    def cancel(self, request: Request) -> None:
        """Stop a request's sequences and free what they hold."""
        request.unfinished = 0
        for sequence in request.sequences:
            self.scheduler.remove(sequence)

    def forget(self, keys: Collection[bytes], digests: Collection[bytes]) -> int:
        """Drop the KV made from these embeddings; entries dropped."""
        return self.cache.forget(frozenset(keys), frozenset(digests))

    def fail_all(self, error: LookonceError) -> None:
        """End every request with an error, and drop all KV. Raises when something is held for nobody afterwards: the
        core can't be used any more."""
        for sequence in [*self.scheduler.running, *self.scheduler.queue]:
            self.scheduler.fail(sequence, error)
        self.scheduler.admitted.clear()
        self.scheduler.prefills.drop_unwanted()
        self.cache.clear()
        if self.pool.used_slots or self.states.used or self.cache.bytes:
            raise RuntimeError(
                f"{self.pool.used_slots} slots, {self.states.used} states and {self.cache.bytes} bytes of prefixes "
                "are nobody's"
            )

    def step(self) -> bool:
        """One step; False when there was nothing to compute."""
        began = time.perf_counter()
        batch = self.scheduler.schedule()
        self._note_admissions()
        if not batch:
            return False
        decoded = sum(suffix.sequence.decoding for suffix in batch.suffixes)
        self._compute(batch)
        elapsed = time.perf_counter() - began
        self.scheduler.budget.note(batch.tokens - decoded, decoded, elapsed)
        self.steps += 1
        self.step_seconds += elapsed
        self.last_step_seconds = elapsed
        return True

    def state(self) -> EngineState:
        """A snapshot."""
        counters = self.scheduler.counters
        waiting = {id(sequence.request) for sequence in self.scheduler.queue if not sequence.request.admitted}
        return EngineState(
            running=len(self.scheduler.running),
            waiting=len(waiting),
            max_running=self.options.max_running,
            max_waiting=self.options.max_waiting,
            generated_tokens=self._generated,
            batch_invariant=self.batch_invariant,
            prefill_tokens=counters.prefill_tokens,
            decode_tokens=counters.decode_tokens,
            prefix_bytes=self.cache.bytes,
            prefix_budget_bytes=self.cache.budget,
            prefix_entries=len(self.cache),
            prefix_hits=counters.prefix_hits,
            prefix_misses=counters.prefix_misses,
            prefix_evictions=self.cache.evictions,
            preemptions=counters.preemptions,
            kv_slots=self.pool.used_slots,
            kv_budget_bytes=self.pool.bytes + self.states.bytes,
            steps=self.steps,
            forward_seconds=self.forward_seconds,
        )

    def _compute(self, batch: Batch) -> None:
        """Run a batch; if that fails, its parts one by one, so that only what cannot be computed fails."""
        try:
            logits = self._run(batch)
        except Exception:  # noqa: BLE001 - logged; each chunk is tried again on its own
            _log.exception("step_failed", tokens=batch.tokens)
            for prefill in batch.prefills:
                if (
                    prefill.prefill in self.scheduler.prefills
                ):  # else those who wanted it have failed with one before it
                    self._compute_alone(Batch(prefills=[prefill]))
            for suffix in batch.suffixes:
                if suffix.sequence.status is Status.RUNNING:
                    self._compute_alone(Batch(suffixes=[suffix]))
            self.check_devices()
            return
        try:
            self._postprocess(batch, logits)
        except Exception:  # noqa: BLE001 - logged; how far it came is not known, so all who took part are told
            _log.exception("postprocess_failed", tokens=batch.tokens)
            self._fail_parts(batch)
            self.check_devices()  # where an asynchronous error of the forward comes to light

    def _compute_alone(self, batch: Batch) -> None:
        try:
            self._postprocess(batch, self._run(batch))
        except Exception:  # noqa: BLE001 - logged; whoever needed this part is told
            _log.exception("sequence_failed")
            self._fail_parts(batch)

    def _fail_parts(self, batch: Batch) -> None:
        for chunk in batch.prefills:
            self.scheduler.fail_prefill(chunk.prefill, internal_error())
        for suffix in batch.suffixes:
            self.scheduler.fail(suffix.sequence, internal_error())

    def check_devices(self) -> None:
        """Raise what a device that computes nothing any more raises."""
        for stage in self._stages:
            torch.ones((), device=stage.device).add(1).item()

    def _run(self, batch: Batch) -> torch.Tensor | None:
        with self._work:
            return self._runner.run(batch)

    @property
    def forward_seconds(self) -> float:
        """What the forwards have taken, on whatever device."""
        return self._work.seconds

    def _postprocess(self, batch: Batch, logits: torch.Tensor | None) -> None:
        wanted = outputs(batch)
        bad: list[Sequence] = []
        scored: list[Sequence] = []
        answered: list[Sequence] = []
        if logits is not None:
            wanted, bad = split_bad(wanted, logits)
            scored = extend_scores(wanted, logits)
            answered = extend_answers(wanted, logits)
        self._runner.commit()
        self.scheduler.computed(batch)
        for sequence in bad:
            self.scheduler.poisoned(sequence)
            self.scheduler.fail(sequence, internal_error())
        for sequence in answered:
            self._answered(sequence)
        for sequence in scored:
            self._scored(sequence)

    def _emit(self, request: Request, event: Event, *, urgent: bool = True) -> None:
        self.events.append((request, event))
        self.urgent = self.urgent or urgent

    def _answered(self, sequence: Sequence) -> None:
        request, answer, new = sequence.request, sequence.answer, sequence.remaining
        self._generated += new
        if answer is None:
            return
        if sequence.sampler is not None and sequence.sampler.failed:
            self.scheduler.fail(sequence, too_complex())
            return
        if answer.reason is not None:
            finish = Finish(answer.index, answer.reason, len(answer.tokens), sequence.timings, answer.stop)
            self._emit(request, answer.take())
            self._emit(request, finish)
            request.unfinished -= 1
            self.scheduler.finish(sequence)
        elif not request.whole:
            self._emit(request, answer.take(), urgent=len(answer.tokens) == new)

    def _scored(self, sequence: Sequence) -> None:
        sequence.timings.total_ms = sequence.timings.ttft_ms = sequence.elapsed_ms()
        self.scheduler.finish(sequence)
        sequence.request.unfinished -= 1
        if not sequence.request.unfinished:
            self._emit(sequence.request, Scored())

    def _note_admissions(self) -> None:
        for sequence in self.scheduler.admitted:
            if not sequence.request.admitted:
                sequence.request.admitted = True
                self._emit(sequence.request, Admitted())
        self.scheduler.admitted.clear()

    def _failed(self, sequence: Sequence, error: LookonceError) -> None:
        """One sequence's failure is its request's."""
        if sequence.request.unfinished:
            self._emit(sequence.request, error)
            self.cancel(sequence.request)


def _free_for_kv(shape: ModelShape) -> int:
    """Free bytes, those of the fullest device counted for all: KV is the same for every layer."""
    return min(free_memory(stage.device) * shape.layers // stage.layers for stage in shape.stages)
