"""Where an engine gets embeddings from: this process's L1, the shared store, then the vision services.

Whatever the source, a record is validated before its rows go anywhere. Simultaneous loads of one key are one load.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import structlog
import torch

from lm_service.engine.types import EmbeddingSource
from lm_service.fingerprints import AcceptedEncoders
from lm_service.metrics import METRICS
from lm_service.peers import VisionPeers
from lm_service.tensor_cache import TensorCache
from lm_service.validation import DamagedRecord, RecordRules
from lookonce.core.embedding_cache import INLINE_BYTES, EmbeddingCache
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.identity import EmbeddingReference
from lookonce.core.record import EmbeddingRecord, parse_record
from lookonce.core.stores import StoreFailure
from lookonce.core.tasks import end_tasks, start_task
from lookonce.models.omp_thread import run_in_omp_thread

log = structlog.get_logger(__name__)
RETRY_SECONDS = 1.0  # until a store that could not be asked is worth another try
Loaded = tuple[torch.Tensor, EmbeddingSource]


@dataclass
class _Flight:
    """One load under way, shared by all who want this reference."""

    reference: EmbeddingReference
    task: asyncio.Task[Loaded]
    waiters: int = field(default=0)


class EmbeddingResolver:
    """An `EmbeddingLoader` (see lm_service.engine.types) over three tiers."""

    def __init__(
        self,
        *,
        l1: TensorCache,
        cache: EmbeddingCache,
        peers: VisionPeers,
        rules: RecordRules,
        accepted: AcceptedEncoders,
    ) -> None:
        self.l1 = l1
        self._cache = cache
        self._peers = peers
        self._rules = rules
        self._accepted = accepted
        self._flights: dict[EmbeddingReference, _Flight] = {}

    def check(self, reference: EmbeddingReference) -> None:
        """Raise FINGERPRINT_MISMATCH, naming both sides, for an encoder that isn't this model's."""
        self._accepted.check(reference.fingerprint)

    async def load(self, reference: EmbeddingReference) -> Loaded:
        """See `EmbeddingLoader.load`; also raises FINGERPRINT_MISMATCH."""
        self.check(reference)
        rows = self.l1.get(reference)
        loaded = (rows, EmbeddingSource.L1) if rows is not None else await self._join(reference)
        METRICS.loads.labels(loaded[1].value).inc()
        return loaded

    async def forget(self, keys: Sequence[bytes], image_digests: Sequence[bytes]) -> tuple[int, bool]:
        """Erase embeddings here and in the store, loads under way included: entries dropped from L1, and whether the
        store is known to hold none of them any more."""
        digests = frozenset(image_digests)
        doomed = {*keys, *self.l1.keys_of(digests)}
        flights = [
            f for f in self._flights.values() if f.reference.key in doomed or f.reference.image_digest in digests
        ]
        doomed.update(flight.reference.key for flight in flights)
        for flight in flights:
            self._end(flight)
        await end_tasks(*(flight.task for flight in flights))
        dropped = sum(self.l1.pop(key) for key in doomed)
        METRICS.l1_bytes.set(self.l1.bytes)
        return dropped, await self._cache.forget(doomed)

    async def _join(self, reference: EmbeddingReference) -> Loaded:
        flight = self._flights.get(reference)
        if flight is None:
            flight = _Flight(reference, start_task(self._load(reference)))
            self._flights[reference] = flight
            flight.task.add_done_callback(partial(self._ended, flight))
        flight.waiters += 1
        try:
            return await asyncio.shield(flight.task)
        except asyncio.CancelledError:
            if flight.task.cancelled() and not _cancelling():
                text = "the image was erased while it was asked about"
                raise LookonceError(ErrorKind.EMBEDDING_MISSING, text, param="image") from None
            raise
        finally:
            flight.waiters -= 1
            if flight.waiters == 0:
                self._end(flight)  # nobody waits for it any more

    def _ended(self, flight: _Flight, task: asyncio.Task[Loaded]) -> None:
        self._end(flight)

    def _end(self, flight: _Flight) -> None:
        if self._flights.get(flight.reference) is flight:
            del self._flights[flight.reference]
        if not flight.task.done():
            flight.task.cancel()
        elif not flight.task.cancelled():
            flight.task.exception()  # seen, even if every waiter has gone

    async def _load(self, reference: EmbeddingReference) -> Loaded:
        refusal: LookonceError | None = None
        record, asked = None, True
        try:
            record = await self._cache.get(reference.key)
        except StoreFailure:  # counted and logged by the store's breaker
            asked = False
        if record is not None:
            try:
                return await self._admit(record, reference), EmbeddingSource.STORE
            except LookonceError as error:
                refusal = error
                log.warning("stored embedding refused", key=reference.key.hex(), reason=error.message)
                if isinstance(error, DamagedRecord):
                    await self._cache.forget([reference.key])
        fetched = await self._peers.fetch(reference.key)
        if fetched is None:
            raise refusal or _missing(asked=asked)
        record = await asyncio.to_thread(parse_record, fetched, reference.key)
        rows = await self._admit(record, reference)
        await _to_its_end(self._cache.put(record))
        return rows, EmbeddingSource.FETCHED

    async def _admit(self, record: EmbeddingRecord, reference: EmbeddingReference) -> torch.Tensor:
        try:
            if sum(view.data.nbytes for view in record.tensors.values()) <= INLINE_BYTES:
                rows = self._rules.rows(record, reference)
            else:
                rows = await asyncio.to_thread(run_in_omp_thread, self._rules.rows, record, reference)
        except LookonceError:
            METRICS.invalid.inc()
            raise
        self.l1.put(reference, rows)
        METRICS.l1_bytes.set(self.l1.bytes)
        return rows


def _cancelling() -> bool:
    """Whether the waiting request itself is being cancelled (rather than the load it waits for)."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _to_its_end(work: Coroutine[Any, Any, object]) -> None:
    """Await `work` even when cancelled meanwhile: what deletes after it must not be overtaken by its write."""
    task = start_task(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


def _missing(*, asked: bool) -> LookonceError:
    """`asked`: the store was; if not, the embedding may well be there, and `retry_after` says so."""
    where = "is in no store" if asked else "could not be looked for in the store,"
    text = f"the image's embedding {where} and no vision service has it; encode it again"
    return LookonceError(ErrorKind.EMBEDDING_MISSING, text, param="image", retry_after=None if asked else RETRY_SECONDS)
