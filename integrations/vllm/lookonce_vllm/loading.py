"""From a store to the shelf, in a thread of its own: verified and fit for the model, or refused with a reason."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from lookonce.core.embedding_cache import EmbeddingCache
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.record import EmbeddingRecord, TensorView, parse_record, tensor_names
from lookonce.core.rpc.client import VisionClient
from lookonce.core.stores import StoreFailure, open_store
from lookonce_vllm.settings import Settings
from lookonce_vllm.shelf import Slot

log = logging.getLogger(__name__)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 0.5  # seconds between looks for what is not stored yet
Write = Callable[[torch.Tensor, tuple[int, int, int]], Slot]
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

T = TypeVar("T")


class Unusable(Exception):
    """The embedding can't be had, or is not one for this model; the text says why."""


@dataclass(frozen=True)
class Wanted:
    """What rows must be for a model. `width` counts those of a deepstack, which vLLM takes beside the first ones."""

    width: int
    dtype: torch.dtype
    fingerprint: str | None = None

    def rows(self, record: EmbeddingRecord) -> torch.Tensor:
        """[tokens, width] of the dtype. Raises Unusable."""
        if self.fingerprint is not None and record.fingerprint != self.fingerprint:
            raise Unusable(f"it was made by encoder {record.fingerprint}, this server takes {self.fingerprint}")
        names = tensor_names(len(record.tensors) - 1)
        if set(names) != set(record.tensors):
            raise Unusable("it has other tensors than rows and those of a deepstack")
        rows = torch.cat([_tensor(record.tensors[name]) for name in names], dim=1)
        if rows.shape[1] != self.width:
            raise Unusable(f"its rows have width {rows.shape[1]}, the model takes {self.width}")
        rows = rows.to(self.dtype)
        if not bool(rows.isfinite().all()):
            raise Unusable(f"not all of its numbers are finite in {str(self.dtype).removeprefix('torch.')}")
        return rows


def _tensor(view: TensorView) -> torch.Tensor:
    return torch.frombuffer(bytearray(view.data), dtype=_DTYPES[view.dtype]).view(view.shape)


class Loader:
    """Loads by embedding key; each at most once at a time."""

    def __init__(self, settings: Settings, wanted: Wanted, write: Write) -> None:
        self._settings, self._wanted, self._write = settings, wanted, write
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="lookonce-loader", daemon=True)
        self._thread.start()
        try:
            self._run(self._open()).result()
        except BaseException:
            self.close()
            raise

    async def _open(self) -> None:
        self._cache = EmbeddingCache(open_store(self._settings.store, strict=True))
        self._vision = [VisionClient(address) for address in self._settings.vision]

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def start(self, key: str) -> Future[Slot]:
        """Load the embedding of 64 hexadecimal characters. The future fails with Unusable."""
        return self._run(self._load(bytes.fromhex(key)))

    async def _load(self, key: bytes) -> Slot:
        record = await self._find(key)
        try:
            return await asyncio.to_thread(self._shelve, record)
        except OSError as error:
            log.exception("the shelf can't be written")
            raise Unusable("there is no room for it on the shelf") from error

    def _shelve(self, record: EmbeddingRecord) -> Slot:
        return self._write(self._wanted.rows(record), record.grid_thw)

    async def _find(self, key: bytes) -> EmbeddingRecord:
        """From the store, or else a vision service; again and again for as long as the settings say."""
        end, pause = self._loop.time() + self._settings.wait_s, _FIRST_PAUSE
        while True:
            lost = "the store has none"
            try:
                record = await self._cache.get(key)
            except StoreFailure:
                record, lost = None, "the store can't be reached"
            record = record or await self._fetched(key)
            if record is not None:
                return record
            if self._loop.time() >= end:
                raise Unusable(f"{lost} (waited {self._settings.wait_s:g} s)")
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _fetched(self, key: bytes) -> EmbeddingRecord | None:
        for client in self._vision:
            try:
                record = parse_record(await client.fetch(key), key)
            except LookonceError as error:
                if error.kind is not ErrorKind.EMBEDDING_MISSING:
                    log.warning("vision service %s: %s", client.address, error.message)
            else:
                await self._cache.put(record)
                return record
        return None

    def close(self) -> None:
        """End the thread; what is being loaded is given up."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)
