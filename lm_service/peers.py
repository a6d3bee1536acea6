"""The vision services that embeddings are fetched from, which are watched."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import structlog

from lm_service.metrics import METRICS
from lm_service.prompt import AcceptedEncoders
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.rpc.client import VisionClient
from lookonce.core.tasks import end_tasks, gather_or_end, keep_running

log = structlog.get_logger(__name__)
CONNECT_SECONDS = 1.0
"""Between two attempts to reach a service."""
RECONNECT_SECONDS = 0.1
"""The same while a request waits for it."""
WATCH_SECONDS = 15.0
"""Between two looks at one that answers: it may have been restarted with another model."""
DESCRIBE_SECONDS = 5.0
"""Longest that one may take to say what it runs."""


class VisionPeer:
    """One vision service. `fingerprint` is None until it has said what encoder it runs."""

    def __init__(self, client: VisionClient, accepted: AcceptedEncoders) -> None:
        self.client = client
        self.fingerprint: str | None = None
        self._accepted = accepted
        self._reachable = True

    @property
    def usable(self) -> bool:
        """Whether it is known to run an encoder of this model."""
        return self.fingerprint in self._accepted.fingerprints

    async def describe(self, timeout: float = DESCRIBE_SECONDS) -> None:
        """Ask what it runs, and log it when that is news."""
        try:
            told = await self.client.describe(timeout=timeout)
        except LookonceError as error:
            if self._reachable:
                log.warning("vision service cannot be reached", address=self.client.address, reason=error.message)
            self._reachable = False
            return
        self._accepted.learn(told)
        news = told.fingerprint != self.fingerprint or not self._reachable
        self._reachable, self.fingerprint = True, told.fingerprint
        if news and self.usable:
            log.info("vision service matches", address=self.client.address, fingerprint=told.fingerprint)
        elif news:
            log.error(
                "vision service runs an encoder of another model: nothing is fetched from it",
                address=self.client.address,
                model=told.model.name,
                fingerprint=told.fingerprint,
                accepted=list(self._accepted.fingerprints),
            )

    async def watch(self) -> None:
        """Keep asking, until cancelled."""
        while True:
            await self.describe()
            await asyncio.sleep(WATCH_SECONDS if self._reachable else CONNECT_SECONDS)


class VisionPeers:
    """All vision services, asked in turn."""

    def __init__(self, clients: Sequence[VisionClient], accepted: AcceptedEncoders, *, fetch_timeout: float) -> None:
        self.peers = [VisionPeer(client, accepted) for client in clients]
        self._accepted = accepted
        self._fetch_timeout = fetch_timeout
        self._watchers: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin watching; needs a running loop."""
        self._watchers = [keep_running(peer.watch) for peer in self.peers]

    async def learn_encoders(self) -> None:
        """Where it is not known which encoders are accepted, ask the services now, for a second at most."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CONNECT_SECONDS):
                while not self._accepted.are_known:
                    await gather_or_end([peer.describe(CONNECT_SECONDS) for peer in self.peers])
                    if all(peer.fingerprint is not None for peer in self.peers):
                        return  # all have answered
                    await asyncio.sleep(RECONNECT_SECONDS)

    async def fetch(self, key: bytes) -> bytes | None:
        """A serialized record from the first service that has it; None when none does. Raises EMBEDDING_MISSING, with
        `retry_after`, when one that may have it can't be asked."""
        unasked = False
        for peer in self.peers:
            if peer.fingerprint is None:
                await peer.describe()
            if not peer.usable:
                unasked = unasked or peer.fingerprint is None
                continue
            try:
                record = await peer.client.fetch(key, timeout=self._fetch_timeout)
            except LookonceError as error:
                if error.kind is not ErrorKind.EMBEDDING_MISSING:
                    METRICS.fetch_failures.inc()
                    log.warning("fetch failed", address=peer.client.address, kind=error.kind, reason=error.message)
                    unasked = True
                continue
            return record
        if unasked:
            text = "the image's embedding is in no store, and a vision service that may have it cannot be reached"
            raise LookonceError(ErrorKind.EMBEDDING_MISSING, text, param="image", retry_after=CONNECT_SECONDS)
        return None

    async def close(self) -> None:
        """Stop watching and close the channels."""
        await end_tasks(*self._watchers)
        for peer in self.peers:
            await peer.client.close()
