"""The encoders whose embeddings this model takes, and the vision services it fetches them from, which are watched."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from lm_service.metrics import METRICS
from lookonce.core.dtypes import SCHEMES
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.identity import WEIGHTS_DIGEST, EmbeddingReference
from lookonce.core.rpc.client import VisionClient
from lookonce.core.tasks import end_tasks, gather_or_end, keep_running
from lookonce.models.checkpoint import Checkpoint
from lookonce.models.checkpoint.checkpoint import COMPUTE_DTYPES
from protos.lookonce.v1 import vision_pb2

log = structlog.get_logger(__name__)
CONNECT_SECONDS = 1.0
"""Between two attempts to reach a service."""
RECONNECT_SECONDS = 0.1
"""The same while a request waits for it."""
WATCH_SECONDS = 15.0
"""Between two looks at one that answers: it may have been restarted with another model."""
DESCRIBE_SECONDS = 5.0
"""Longest that one may take to say what it runs."""
_UNTOLD = (
    "only the language half is here, and no vision service of --vision that runs this checkpoint has been reached; "
    "give one, a half that `lookonce split` wrote, or --encoder-weights"
)


class AcceptedEncoders:
    """The accepted fingerprints, each 64 hexadecimal characters.

    They follow from the digest of the vision half's tensors and from this checkpoint's own settings. A host that has
    neither those tensors nor a half that `lookonce split` wrote is told the digest by a vision service of the same
    checkpoint; until then no encoder is accepted.
    """

    def __init__(self, fingerprints: Sequence[str], untold: _Untold | None = None) -> None:
        self.fingerprints = tuple(fingerprints)
        self._untold = untold

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        encoder_dtype: str,
        encoder_quantization: str = "none",
        encoder_weights: str | None = None,
    ) -> AcceptedEncoders:
        """Those derived from a checkpoint. `encoder_dtype` is a compute dtype, or "auto" for any;
        `encoder_quantization` is "none", or "int8" for weights in int8 on any device; `encoder_weights` the digest of
        the encoders' tensors, unset: the checkpoint's own. Raises CheckpointError."""
        dtypes = COMPUTE_DTYPES if encoder_dtype == "auto" else (encoder_dtype,)
        ways = ("none",) if encoder_quantization == "none" else SCHEMES

        def derive(weights: str) -> tuple[str, ...]:
            return tuple(checkpoint.encoder_spec(dtype, way, weights).fingerprint() for dtype in dtypes for way in ways)

        weights = encoder_weights or checkpoint.vision_weights
        return cls((), _Untold(checkpoint.identity, derive)) if weights is None else cls(derive(weights))

    @property
    def are_known(self) -> bool:
        """Whether it is known which they are."""
        return self._untold is None

    def learn(self, told: vision_pb2.VisionDescription) -> None:
        """Take a vision service's word for the weights, where they are not known: if it runs this very checkpoint,
        and its fingerprint is the one that follows from what it says and this checkpoint's own settings."""
        if self._untold is None or told.model.checkpoint != self._untold.checkpoint:
            return
        if re.fullmatch(WEIGHTS_DIGEST, told.model.vision_weights) is None:
            return
        fingerprints = self._untold.derive(told.model.vision_weights)
        if told.fingerprint in fingerprints:
            self.fingerprints, self._untold = fingerprints, None
            log.info("a vision service has told its weights", weights=told.model.vision_weights)

    def check(self, reference: EmbeddingReference) -> None:
        """Raise FINGERPRINT_MISMATCH naming both sides unless the encoder is accepted."""
        if reference.fingerprint in self.fingerprints:
            return
        taken, why = ", ".join(self.fingerprints), "the two services run different models or settings"
        if not self.are_known:
            taken, why = "none yet", _UNTOLD
        raise LookonceError(
            ErrorKind.FINGERPRINT_MISMATCH,
            f"the image was encoded by {reference.fingerprint[:64]!r}, this language model takes {taken}: {why}",
            param="image.fingerprint",
        )


@dataclass(frozen=True)
class _Untold:
    """What the accepted fingerprints will follow from, once the weights are known."""

    checkpoint: str  # identity
    derive: Callable[[str], tuple[str, ...]]  # fingerprints by the digest of the vision half's tensors


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
