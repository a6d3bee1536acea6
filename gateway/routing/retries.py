"""When a call to a replica is worth another try. One policy for every kind of call."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Generic

from gateway.metrics import RETRIES
from gateway.routing.replicas import C, Endpoint, Replicas
from lookonce.core.errors import ErrorKind, LookonceError

STALE = frozenset({ErrorKind.EMBEDDING_MISSING, ErrorKind.EMBEDDING_INVALID, ErrorKind.FINGERPRINT_MISMATCH})
"""The reference is no longer good: the image is encoded again, once."""
_OURS = frozenset({ErrorKind.UNAUTHENTICATED, ErrorKind.PERMISSION_DENIED})


class Recovery(Generic[C]):
    """The tries of one request: one more on another replica (or the same, once it is back), one escape from a full
    replica, one renewal of stale references."""

    def __init__(
        self,
        replicas: Replicas[C],
        key: bytes,
        *,
        patience: float,
        renew: Callable[[LookonceError], Awaitable[bool]] | None = None,
    ) -> None:
        self._replicas = replicas
        self._key = key
        self._patience = patience  # seconds to wait for a replica to come back
        self._renew = renew
        self._avoid: Endpoint[C] | None = None
        self._retried = self._escaped = False
        self.renewed = False  # stale references were made anew

    def choose(self) -> Endpoint[C]:
        """The replica for the next try."""
        return self._replicas.choose(self._key, self._avoid)

    async def recover(self, error: LookonceError, endpoint: Endpoint[C], *, started: bool = False) -> None:
        """Return to try again; raise what the caller is to see. `started`: part of the answer is out already."""
        if error.kind is ErrorKind.UNAVAILABLE:
            self._replicas.failed(endpoint)
        if started or not await self._another(error, endpoint):
            raise as_public(error) from error
        RETRIES.labels(error.kind.value).inc()

    async def _another(self, error: LookonceError, endpoint: Endpoint[C]) -> bool:
        if error.kind is ErrorKind.UNAVAILABLE and not self._retried:
            self._retried, self._avoid = True, endpoint
            return self._replicas.any_live(endpoint) or await self._replicas.wait(self._patience)
        if error.kind is ErrorKind.OVERLOADED and not self._escaped and self._replicas.any_live(endpoint):
            self._escaped, self._avoid = True, endpoint
            return True
        if error.kind in STALE and not self.renewed and self._renew is not None:
            self.renewed = True
            return await self._renew(error)
        return False


def as_public(error: LookonceError) -> LookonceError:
    """A service that refuses the gateway's own credentials is out of order to the client, not a fault of theirs."""
    if error.kind in _OURS:
        return LookonceError(ErrorKind.UNAVAILABLE, "a service refused the gateway", retry_after=5.0)
    return error
