"""`VisionCore`: from an encoded image to a stored embedding, once. Knows nothing of gRPC.

digest -> key -> store -> single flight -> decode and cut (worker pool) -> batch -> record -> store.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from lookonce.core.embedding_cache import EmbeddingCache
from lookonce.core.errors import ErrorKind, LookonceError, invalid
from lookonce.core.identity import DIGEST_BYTES, SHARED_TENANT_KEY, EmbeddingReference, embedding_key, image_digest
from lookonce.core.record import EMBEDDING, EmbeddingRecord
from lookonce.core.single_flight import Flight, How, SingleFlight
from lookonce.core.stores import Store
from lookonce.core.stores.wrappers import SealedStore
from lookonce.core.telemetry import tracing
from lookonce.models.family import Patches, VisionEncoder
from lookonce.models.tensors import views_of
from vision_service import metrics
from vision_service.batcher import Batcher, Encoded
from vision_service.image_index import ImageIndex
from vision_service.images import Decoder
from vision_service.settings import VisionSettings

_INLINE_DIGEST_BYTES = 256 * 1024
MAX_FORGET = 10_000
BATCH_PATCHES = {True: 2048, False: 16384}
"""By whether a CPU encodes: it gains nothing by more, and others wait longer for the first rows."""


@dataclass(frozen=True)
class Model:
    """What the core must know of the tower it serves."""

    fingerprint: str
    hidden_size: int
    least_pixels: int  # of the smallest image that has a token
    own_bounds: tuple[int, int]  # the checkpoint's min and max pixels
    bounds: tuple[int, int]  # the service's: requests may go below both, and raise the min up to the max
    tensors: tuple[str, ...] = (EMBEDDING,)  # of an embedding


@dataclass
class Work:
    """What was done for one flight, in milliseconds."""

    encoded: bool = False  # a forward was run for it
    queue_ms: float = 0.0
    preprocess_ms: float = 0.0
    encode_ms: float = 0.0
    store_ms: float = 0.0
    stored: bool = False
    begun: bool = False  # its forward has: it is ended and saved, whoever still waits

    def begin(self) -> None:
        """Its forward begins."""
        self.begun = True


@dataclass(frozen=True)
class Encoding:
    """The answer to one request."""

    reference: EmbeddingReference
    record: EmbeddingRecord
    outcome: How
    work: Work
    total_ms: float


@dataclass
class Counters:
    """Since the process started."""

    encodes: int = 0
    hits: int = 0
    coalesced: int = 0


@dataclass(frozen=True)
class _Made:
    record: EmbeddingRecord
    work: Work


@dataclass
class _Job:
    image: bytes
    digest: bytes
    key: bytes
    bounds: tuple[int, int]
    ttl: float | None
    work: Work = field(default_factory=Work)
    near: EmbeddingRecord | None = None  # found in this process's memory, but not in the store that is shared


class VisionCore:
    """Encodes images. `store` is what lookups go through; `shared` its tier that other processes see."""

    def __init__(
        self,
        model: Model,
        encoder: VisionEncoder,
        decoder: Decoder,
        store: Store,
        shared: Store,
        settings: VisionSettings,
    ) -> None:
        self.model = model
        self.decoder = decoder
        self.counters = Counters()
        self._encoder = encoder
        self._store = store
        self._shared = shared
        self._cache = EmbeddingCache(store)
        self._index = ImageIndex(SealedStore(self._shared, "image-index"))
        self._flights: SingleFlight[_Made] = SingleFlight(store, lease_seconds=settings.lease_seconds)
        self._pool = ThreadPoolExecutor(settings.decode_workers, thread_name_prefix="decode")
        self._slots = asyncio.Semaphore(settings.decode_workers)
        self._max_waiting = settings.max_waiting
        self._under_way = 0
        self._batched = 0
        self._pace = 0.05  # seconds an image, running mean
        self._batcher = Batcher(
            encoder.encode,
            max_patches=settings.batch_patches or BATCH_PATCHES[encoder.device.type == "cpu"],
            wait=settings.batch_wait_ms / 1000,
            queue_patches=settings.queue_patches,
            expected=lambda: self._under_way - self._batched,
        )

    def start(self) -> None:
        """Begin to work, on the running loop."""
        self._batcher.start()

    async def close(self) -> None:
        """Stop the threads, then close the store."""
        await self._batcher.close()
        await asyncio.to_thread(self._pool.shutdown, cancel_futures=True)
        await self._store.close()

    async def encode(
        self,
        image: bytes,
        *,
        tenant_key: bytes = b"",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        ttl: float | None = None,
    ) -> Encoding:
        """The embedding of an encoded image file, from the store or made now.

        Raises LookonceError: IMAGE_INVALID, IMAGE_TOO_LARGE, PAYLOAD_TOO_LARGE, INVALID_ARGUMENT (bounds, tenant key,
        ttl), OVERLOADED.
        """
        started = time.perf_counter()
        self.decoder.check_bytes(image)
        bounds = self._bounds(min_pixels, max_pixels)
        if ttl is not None and not (ttl > 0 and math.isfinite(ttl)):
            raise invalid("ttl must be a positive number of seconds", param="ttl")
        digest = await _digest(image, tenant_key or SHARED_TENANT_KEY)
        job = _Job(image, digest, embedding_key(digest, self.model.fingerprint, *bounds), bounds, ttl)
        made, outcome = await self._flights.run(
            job.key,
            load=lambda: self._load(job),
            make=lambda: self._make(job),
            save=lambda value: self._save(job, value),
            discard=lambda: self._store.delete(job.key),
            keep=lambda: job.work.begun,
            label=digest,
        )
        if outcome == "miss" and not made.work.encoded:
            outcome = "hit"
        self._tally(outcome)
        total_ms = 1000 * (time.perf_counter() - started)
        return Encoding(_reference(job.key, made.record), made.record, outcome, made.work, total_ms)

    async def fetch(self, key: bytes) -> bytes:
        """The serialized record of a key. Raises EMBEDDING_MISSING when no store has it."""
        _check_lengths((key,), "key")
        record = await self._cache.get(key)
        if record is None or not self._is_ours(record):
            raise LookonceError(ErrorKind.EMBEDDING_MISSING, "no store has this embedding", param="key")
        return await asyncio.to_thread(record.serialize)

    async def forget(self, keys: Collection[bytes], digests: Collection[bytes]) -> tuple[int, bool]:
        """Erase embeddings by key, and all made from images by digest, work under way included.

        Returns how many were dropped, and whether every store is known to be rid of them.
        """
        if len(keys) + len(digests) > MAX_FORGET:
            raise invalid(f"keys and image_digests: at most {MAX_FORGET} at once", param="keys")
        _check_lengths(keys, "keys")
        _check_lengths(digests, "image_digests")
        doomed, labels = set(keys), frozenset(digests)

        def concerned(flight: Flight[_Made]) -> bool:
            return flight.key in doomed or flight.label in labels

        dropped = await self._flights.forget_if(concerned)
        complete = True
        for digest in labels:
            doomed.add(embedding_key(digest, self.model.fingerprint, *self.model.own_bounds))
            doomed |= await self._index.keys(digest)
        for key in doomed:
            dropped += await self._store.contains(key)
            complete = await self._store.delete(key) and complete
        for digest in labels:  # last, so that an interrupted erasure can be asked for again
            complete = complete and await self._index.remove(digest)
        return dropped, complete

    def _bounds(self, min_pixels: int | None, max_pixels: int | None) -> tuple[int, int]:
        least, most = self.model.bounds
        smallest = self.model.least_pixels
        if max_pixels is not None and not smallest <= max_pixels <= most:
            raise invalid(f"max_pixels must be from {smallest} to {most}, got {max_pixels}", param="max_pixels")
        if min_pixels is not None and not 1 <= min_pixels <= most:
            raise invalid(f"min_pixels must be from 1 to {most}, got {min_pixels}", param="min_pixels")
        high = most if max_pixels is None else max_pixels
        low = min(least, high) if min_pixels is None else min_pixels
        if low > high:
            raise invalid(f"min_pixels {low} is above max_pixels {high}: lower it", param="min_pixels")
        return low, high

    async def _load(self, job: _Job) -> _Made | None:
        started = time.perf_counter()
        record = await self._cache.get(job.key)
        if record is not None and (not self._is_ours(record) or record.image_digest != job.digest):
            await self._store.delete(job.key)
            record = None
        job.near = record if record is not None and await self._is_lost(job.key) else None
        job.work.store_ms += 1000 * (time.perf_counter() - started)
        if record is None or job.near is not None:  # near: made of that, and saved as if it were new
            return None
        job.work.stored = True
        return _Made(record, job.work)

    async def _is_lost(self, key: bytes) -> bool:
        """Whether the store that is shared, being in order, lacks what this process has."""
        if self._shared is self._store or any(tier.degraded for tier in self._shared.stats()):
            return False
        return not await self._shared.contains(key)

    def _is_ours(self, record: EmbeddingRecord) -> bool:
        widths = {name: view.shape[1] for name, view in record.tensors.items()}
        expected = dict.fromkeys(self.model.tensors, self.model.hidden_size)
        return record.fingerprint == self.model.fingerprint and widths == expected

    async def _make(self, job: _Job) -> _Made:
        if job.near is not None:
            return _Made(job.near, job.work)
        if self._under_way >= self._max_waiting:
            raise LookonceError(
                ErrorKind.OVERLOADED,
                f"{self._under_way} images are under way, the limit is {self._max_waiting}",
                retry_after=min(30.0, max(1.0, round(self._pace * self._under_way, 1))),
            )
        self._under_way += 1
        metrics.UNDER_WAY.set(self._under_way)
        try:
            record = await self._embed(job)
        finally:
            self._under_way -= 1
            metrics.UNDER_WAY.set(self._under_way)
        return _Made(record, job.work)

    async def _embed(self, job: _Job) -> EmbeddingRecord:
        begun, started = time.time_ns(), time.perf_counter()
        loop = asyncio.get_running_loop()
        async with self._slots:
            await self._batcher.room()
            entered = time.perf_counter()
            patches = await loop.run_in_executor(self._pool, self._prepare, job)
        prepared = time.perf_counter()
        self._batched += 1
        try:
            encoded = await self._batcher.encode(patches, begun=job.work.begin)
        finally:
            self._batched -= 1
        self.counters.encodes += 1
        job.work.encoded = True
        metrics.ENCODES.inc()
        job.work.queue_ms = 1000 * (entered - started) + encoded.queue_ms
        job.work.preprocess_ms = 1000 * (prepared - entered)
        job.work.encode_ms = encoded.encode_ms
        _record(begun, 1000 * (entered - started), 1000 * (prepared - started), encoded)
        self._pace += 0.05 * (encoded.encode_ms / 1000 - self._pace)
        return EmbeddingRecord(
            key=job.key,
            fingerprint=self.model.fingerprint,
            image_digest=job.digest,
            grid_thw=patches.grid_thw,
            width=patches.width,
            height=patches.height,
            tokens=encoded.rows.shape[-2],
            tensors=views_of(encoded.rows, self.model.tensors),
        )

    def _prepare(self, job: _Job) -> Patches:
        """In a decode thread."""
        return self.decoder.decoded(job.image, lambda image: self._encoder.prepare(image, *job.bounds))

    async def _save(self, job: _Job, made: _Made) -> None:
        started = time.perf_counter()
        if job.bounds != self.model.own_bounds:
            await self._index.add(job.digest, job.key, ttl=job.ttl)
        made.work.stored = await self._cache.put(made.record, ttl=job.ttl)
        made.work.store_ms += 1000 * (time.perf_counter() - started)

    def _tally(self, outcome: How) -> None:
        if outcome == "hit":
            self.counters.hits += 1
            metrics.HITS.inc()
        elif outcome == "coalesced":
            self.counters.coalesced += 1
            metrics.COALESCED.inc()


def _record(begun: int, entered: float, prepared: float, encoded: Encoded) -> None:
    """What an image went through, as steps of the trace of whoever asked for it first; milliseconds after `begun`."""
    batched = prepared + encoded.queue_ms
    tracing.record("encode.wait", begun, 0.0, entered)
    tracing.record("encode.prepare", begun, entered, prepared)
    tracing.record("encode.batch", begun, prepared, batched)
    tracing.record("encode.forward", begun, batched, batched + encoded.encode_ms)


async def _digest(image: bytes, tenant_key: bytes) -> bytes:
    if len(image) <= _INLINE_DIGEST_BYTES:
        return image_digest(image, tenant_key)
    return await asyncio.to_thread(image_digest, image, tenant_key)


def _reference(key: bytes, record: EmbeddingRecord) -> EmbeddingReference:
    return EmbeddingReference(
        key=key,
        fingerprint=record.fingerprint,
        image_digest=record.image_digest,
        grid_thw=record.grid_thw,
        tokens=record.tokens,
        width=record.width,
        height=record.height,
        record_bytes=record.nbytes,
    )


def _check_lengths(values: Iterable[bytes], name: str) -> None:
    for value in values:
        if len(value) != DIGEST_BYTES:
            raise invalid(f"{name} must be {DIGEST_BYTES} bytes each, got {len(value)}", param=name)
