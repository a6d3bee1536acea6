"""Erasure in every process: what could not be confirmed is asked for again in the background until it is."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import structlog

from gateway.variants import Variants
from lookonce.errors import LookonceError
from lookonce.rpc.client import LanguageClient, VisionClient
from lookonce.tasks import end_tasks, start_task

FIRST_PAUSE = 1.0
LAST_PAUSE = 60.0
log = structlog.get_logger(__name__)


class Eraser:
    """Tells every vision and language endpoint of every variant to forget, live or not, and those that were endpoints
    of late."""

    def __init__(self, variants: Variants) -> None:
        self._variants = variants
        self._pending: dict[bytes, asyncio.Task[None]] = {}

    async def erase(
        self,
        digest: bytes,
        keys: Sequence[bytes],
        image_digests: Sequence[bytes],
        forget_file: Callable[[], Awaitable[bool]],
        finish: Callable[[], Awaitable[bool]],
    ) -> bool:
        """Erase file and embeddings; whether all of it is confirmed, upon which `finish` is called. The file's record
        goes first, so that no new embedding is made."""

        async def attempt() -> bool:
            file_gone = await forget_file()
            return await self.forget(keys, image_digests) and file_gone and await finish()

        complete = await attempt()
        if complete:
            task = self._pending.pop(digest, None)
            if task is not None:
                task.cancel()
        elif digest not in self._pending:
            self._pending[digest] = start_task(self._again(digest, attempt), awaited=False)
        return complete

    async def forget(self, keys: Sequence[bytes], image_digests: Sequence[bytes]) -> bool:
        """Ask all endpoints; whether all of them confirmed."""
        # The encoders first: a language service could otherwise fetch what is about to go.
        served = self._variants.remembered
        eyes = [endpoint.client for variant in served for endpoint in variant.vision.remembered]
        mouths = [endpoint.client for variant in served for endpoint in variant.language.remembered]
        seen = await asyncio.gather(*(_forget(client, keys, image_digests) for client in eyes))
        said = await asyncio.gather(*(_forget(client, keys, image_digests) for client in mouths))
        return all(seen) and all(said)

    async def close(self) -> None:
        """Stop the background work."""
        tasks = list(self._pending.values())
        await end_tasks(*tasks)

    async def _again(self, digest: bytes, attempt: Callable[[], Awaitable[bool]]) -> None:
        pause = FIRST_PAUSE
        while True:
            await asyncio.sleep(pause)
            if await attempt():
                self._pending.pop(digest, None)
                return
            log.warning("erasure is still incomplete", next_try_seconds=pause)
            pause = min(2 * pause, LAST_PAUSE)


async def _forget(client: VisionClient | LanguageClient, keys: Sequence[bytes], image_digests: Sequence[bytes]) -> bool:
    try:
        reply = await client.forget(keys, image_digests)
    except LookonceError:
        return False
    return bool(reply.complete)
