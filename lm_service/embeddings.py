"""Where an engine gets embeddings from: this process's tensor cache, the shared store, then the vision services.

Whatever the source, a record is validated before its rows go anywhere. Simultaneous loads of one image are one load.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Container, Coroutine, Sequence
from typing import Any, TypeVar, cast

import structlog

from lm_service.engine.types import DamagedRecord, EmbeddingSource, Rows
from lm_service.metrics import METRICS
from lm_service.peers import VisionPeers
from lm_service.prompt import AcceptedEncoders
from lookonce.core.embedding_cache import INLINE_BYTES, EmbeddingCache
from lookonce.core.errors import ErrorKind, LookonceError, RecordError
from lookonce.core.identity import EmbeddingReference
from lookonce.core.record import EMBEDDING, EmbeddingRecord, TensorView, parse_record
from lookonce.core.single_flight import Abandoned, Flights
from lookonce.core.stores import StoreFailure
from lookonce.core.tasks import start_task
from lookonce.models.omp_thread import run_in_omp_thread

log = structlog.get_logger(__name__)
RETRY_SECONDS = 1.0  # until a store that could not be asked is worth another try
R = TypeVar("R", bound=Rows)


class TensorCache:
    """The nearest tier: rows in the engine's form by embedding key, least recently used out first. Not thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._entries: OrderedDict[bytes, tuple[EmbeddingReference, Rows]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, reference: EmbeddingReference) -> Rows | None:
        """The rows, if they are of this very reference (key, image, grid and encoder agree)."""
        kept, rows = self._entries.get(reference.key, (None, None))
        if kept is None or not _same(kept, reference):
            return None
        self._entries.move_to_end(reference.key)
        return rows

    def put(self, reference: EmbeddingReference, rows: Rows) -> None:
        """Keep the rows, dropping others to stay within the budget; rows over the whole budget are not kept."""
        self.pop(reference.key)
        if rows.nbytes > self.max_bytes:
            return
        self._entries[reference.key] = reference, rows
        self.bytes += rows.nbytes
        while self.bytes > self.max_bytes:
            self.pop(next(iter(self._entries)))

    def pop(self, key: bytes) -> bool:
        """Drop an entry; whether it was there."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.bytes -= entry[1].nbytes
        return entry is not None

    def keys_of(self, image_digests: Container[bytes]) -> list[bytes]:
        """Keys of the entries made from these images."""
        return [key for key, (kept, _) in self._entries.items() if kept.image_digest in image_digests]


def _same(one: EmbeddingReference, other: EmbeddingReference) -> bool:
    fields = ("fingerprint", "image_digest", "grid_thw", "tokens")
    return all(getattr(one, field) == getattr(other, field) for field in fields)


def rows_of_record(
    record: EmbeddingRecord, reference: EmbeddingReference, hidden_size: int, names: Sequence[str]
) -> list[TensorView]:
    """The tensors [tokens, hidden] of these names as they are stored, once the record is the one referred to and fits
    the model.

    Raises DamagedRecord, EMBEDDING_INVALID for another image's record, FINGERPRINT_MISMATCH.
    """
    if record.fingerprint != reference.fingerprint:
        raise LookonceError(
            ErrorKind.FINGERPRINT_MISMATCH,
            f"the embedding was made by encoder {record.fingerprint[:64]}, the reference names {reference.fingerprint}",
            param="image.fingerprint",
        )
    if record.image_digest != reference.image_digest:
        raise RecordError("the embedding under this key is of another image")
    if record.grid_thw != reference.grid_thw or record.tokens != reference.tokens:
        raise RecordError("the embedding's grid or token count differs from the reference's")
    if set(record.tensors) != set(names):
        raise DamagedRecord(f"embedding has other tensors than the model takes, {', '.join(names)}")
    views = [record.tensors[name] for name in names]
    for name, view in zip(names, views, strict=True):
        if view.shape[0] != reference.tokens:
            raise DamagedRecord(f"embedding has {view.shape[0]} rows, its grid makes {reference.tokens} tokens")
        if view.shape[1] != hidden_size:
            raise DamagedRecord(f"embedding has width {view.shape[1]} in {name}, the model takes {hidden_size}")
    return views


class EmbeddingResolver:
    """An `EmbeddingLoader` (see lm_service.engine.types) over three tiers."""

    def __init__(
        self,
        *,
        tensors: TensorCache,
        cache: EmbeddingCache,
        peers: VisionPeers,
        hidden_size: int,
        accepted: AcceptedEncoders,
        names: Sequence[str] = (EMBEDDING,),
    ) -> None:
        """`hidden_size` is the width of the model's rows; `names` are those of an embedding's tensors."""
        self.tensors = tensors
        self._cache = cache
        self._peers = peers
        self._hidden_size, self._names = hidden_size, names
        self._accepted = accepted
        self._flights: Flights[tuple[Rows, EmbeddingSource]] = Flights()

    async def load(self, reference: EmbeddingReference, rows_of: Callable[..., R]) -> tuple[R, EmbeddingSource]:
        """See `EmbeddingLoader.load`; also raises FINGERPRINT_MISMATCH."""
        self._accepted.check(reference)
        rows, source = self.tensors.get(reference), EmbeddingSource.TENSOR_CACHE
        if rows is None:
            try:
                (rows, source), _ = await self._flights.run(
                    reference, lambda: self._load(reference, rows_of), label=reference
                )
            except Abandoned:
                text = "the image was erased while it was asked about"
                raise LookonceError(ErrorKind.EMBEDDING_MISSING, text, param="image") from None
        METRICS.loads.labels(source.value).inc()
        return cast(R, rows), source

    async def forget(self, keys: Sequence[bytes], image_digests: Sequence[bytes]) -> tuple[int, bool]:
        """Erase embeddings here and in the store, loads under way included: entries dropped from the tensor cache, and
        whether the store is known to hold none of them any more."""
        digests = frozenset(image_digests)
        doomed = {*keys, *self.tensors.keys_of(digests)}
        flights = self._flights.matching(
            lambda flight: flight.label.key in doomed or flight.label.image_digest in digests
        )
        doomed.update(flight.label.key for flight in flights)
        await self._flights.end(flights)
        dropped = sum(self.tensors.pop(key) for key in doomed)
        METRICS.tensor_cache_holds(self.tensors.bytes)
        return dropped, await self._cache.forget(doomed)

    async def _load(self, reference: EmbeddingReference, rows_of: Callable[..., Rows]) -> tuple[Rows, EmbeddingSource]:
        refusal: LookonceError | None = None
        record, asked = None, True
        try:
            record = await self._cache.get(reference.key)
        except StoreFailure:  # counted and logged by the store's breaker
            asked = False
        if record is not None:
            try:
                return await self._admit(record, reference, rows_of), EmbeddingSource.STORE
            except LookonceError as error:
                refusal = error
                log.warning("stored embedding refused", key=reference.key.hex(), reason=error.message)
                if isinstance(error, DamagedRecord):
                    await self._cache.forget([reference.key])
        fetched = await self._peers.fetch(reference.key)
        if fetched is None:
            raise refusal or _missing(asked=asked)
        record = await asyncio.to_thread(parse_record, fetched, reference.key)
        rows = await self._admit(record, reference, rows_of)
        await _to_its_end(self._cache.put(record))
        return rows, EmbeddingSource.FETCHED

    async def _admit(
        self, record: EmbeddingRecord, reference: EmbeddingReference, rows_of: Callable[..., Rows]
    ) -> Rows:
        try:
            views = rows_of_record(record, reference, self._hidden_size, self._names)
            inline = sum(view.data.nbytes for view in views) <= INLINE_BYTES
            rows = rows_of(*views) if inline else await asyncio.to_thread(run_in_omp_thread, rows_of, *views)
        except LookonceError:
            METRICS.invalid.inc()
            raise
        self.tensors.put(reference, rows)
        METRICS.tensor_cache_holds(self.tensors.bytes)
        return rows


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
