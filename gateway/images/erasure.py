"""Erasure in every process and store: what could not be confirmed is asked for again in the background until it is.

An erasure applies to what was there when it was asked for. An image that is uploaded again meanwhile is another upload:
its file, record, names and embeddings stay.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import count

import structlog

from gateway.images.image_records import ImageRecord, ImageRecords, file_key
from gateway.images.image_store import StoreWithSpare
from gateway.images.index import Aliases, Listing
from gateway.images.kept_responses import KeptResponses
from gateway.images.vector_cache import vectors_key
from gateway.routing.retries import pause
from gateway.routing.variants import Variants
from lookonce.core.errors import LookonceError
from lookonce.core.rpc.client import LanguageClient, VisionClient
from lookonce.core.tasks import end_tasks, start_task

FIRST_PAUSE = 1.0
LAST_PAUSE = 60.0
log = structlog.get_logger(__name__)
Attempt = Callable[[], Awaitable[bool]]
"""One try at an erasure; whether all of it is confirmed."""


class Eraser:
    """Tells every vision and language endpoint of every variant to forget, live or not, and those that were endpoints
    of late."""

    def __init__(self, variants: Variants) -> None:
        self._variants = variants
        self._pending: dict[Hashable, asyncio.Task[None]] = {}

    async def erase(self, name: Hashable, attempt: Attempt) -> bool:
        """Try now, and unless that is complete, again and again in the background; whether it is complete."""
        complete = await _tried(attempt)
        if complete:
            task = self._pending.pop(name, None)
            if task is not None:
                task.cancel()
        elif name not in self._pending:
            self._pending[name] = start_task(self._again(name, attempt), awaited=False)
        return complete

    async def forget(self, keys: Sequence[bytes], image_digests: Sequence[bytes]) -> bool:
        """Ask all endpoints; whether all of them confirmed."""
        if not keys and not image_digests:
            return True
        # The encoders first: a language service could otherwise fetch what is about to go.
        served = self._variants.remembered
        vision = [endpoint.client for variant in served for endpoint in variant.vision.remembered]
        language = [endpoint.client for variant in served for endpoint in variant.language.remembered]
        forgotten = await asyncio.gather(*(_forget(client, keys, image_digests) for client in vision))
        forgotten += await asyncio.gather(*(_forget(client, keys, image_digests) for client in language))
        return all(forgotten)

    async def close(self) -> None:
        """Stop the background work."""
        tasks = list(self._pending.values())
        await end_tasks(*tasks)

    async def _again(self, name: Hashable, attempt: Attempt) -> None:
        for tries in count(1):
            await asyncio.sleep(pause(tries, FIRST_PAUSE, LAST_PAUSE))
            if await _tried(attempt):
                self._pending.pop(name, None)
                return
            log.warning("erasure is still incomplete", tries=tries)


@dataclass(frozen=True)
class Traces:
    """What the gateway itself keeps of an image: file, vectors, record, names, a place in the list, responses."""

    kept: StoreWithSpare
    records: ImageRecords
    aliases: Aliases
    listing: Listing
    responses: KeptResponses

    async def remove(self, record: ImageRecord, asked: float) -> bool:
        """Leave a tombstone and nothing else; whether that is confirmed. Call with the record's lease held."""
        buried = await self.records.bury(record, asked)  # first, so that no new embedding is made
        unnamed = [await self.aliases.drop(record, alias) for alias in record.aliases]
        await self.listing.remove(record.tenant, [record.digest.hex()])
        gone = [await self.kept.delete(key) for key in (file_key(record.digest), vectors_key(record.digest))]
        forgotten = await self.responses.drop_of(record.digest)
        return all([*gone, buried, *unnamed, forgotten])


class Erasure:
    """One upload of an image, to be erased from everywhere."""

    def __init__(self, record: ImageRecord, traces: Traces, eraser: Eraser) -> None:
        self._record = record
        self._traces = traces
        self._eraser = eraser
        self._asked = False
        self._since = time.time()

    async def begin(self) -> bool:
        """Erase now, and in the background for as long as it takes; whether it is complete."""
        return await self._eraser.erase((self._record.digest, self._record.upload), self._attempt)

    async def _attempt(self) -> bool:
        records, record = self._traces.records, self._record
        keys = _keys(record)
        digests = {item.image_digest for item in record.references.values()} | {record.digest}
        async with records.held(record.digest):
            later = await self._later()
            removed = later is not None or await self._traces.remove(record, self._since)
        if later is not None:  # what both were made into is the later one's now
            keys, digests = keys - _keys(later), set()
        return await self._eraser.forget(sorted(keys), sorted(digests)) and removed and await self._finish()

    async def _later(self) -> ImageRecord | None:
        """The record of a later upload, if there was one. Raises StoreOutage when the store can't tell, but for the
        first time: then what was asked for is what there is."""
        records = self._traces.records
        again, self._asked = self._asked, True
        current = await records.load(self._record.digest, fresh=True, sure=again, held=True)
        return current if current is not None and current.upload != self._record.upload else None

    async def _finish(self) -> bool:
        records, record = self._traces.records, self._record
        async with records.held(record.digest):
            return await self._later() is not None or await records.bury(replace(record, erased=True), self._since)


def _keys(record: ImageRecord) -> set[bytes]:
    return {item.key for item in record.references.values()}


async def _tried(attempt: Attempt) -> bool:
    try:
        return await attempt()
    except LookonceError as error:
        log.warning("an erasure could not be tried", reason=error.message)
    except Exception:  # whatever it was, the erasure is not over
        log.exception("an erasure failed unforeseen")
    return False


async def _forget(client: VisionClient | LanguageClient, keys: Sequence[bytes], image_digests: Sequence[bytes]) -> bool:
    try:
        reply = await client.forget(keys, image_digests)
    except LookonceError:
        return False
    return bool(reply.complete)
