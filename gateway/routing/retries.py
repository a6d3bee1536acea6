"""How often a request is tried, on what failure, where, and after which pause: all of it is said here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Generic, TypeVar

import tenacity

from gateway.metrics import RETRIES
from gateway.routing.replicas import C, Endpoint, Replicas
from gateway.routing.variants import Variant
from lookonce.core.errors import ErrorKind, LookonceError

STALE = frozenset({ErrorKind.EMBEDDING_MISSING, ErrorKind.EMBEDDING_INVALID, ErrorKind.FINGERPRINT_MISMATCH})
"""The reference is no longer good: the image is encoded again, once."""
LATER = frozenset({ErrorKind.OVERLOADED, ErrorKind.RATE_LIMITED, ErrorKind.UNAVAILABLE})
"""What may go well a little later, though not within this request."""
BUSY_TRIES = 6
BUSY_PAUSES = (0.1, 2.0)  # seconds
_OURS = frozenset({ErrorKind.UNAUTHENTICATED, ErrorKind.PERMISSION_DENIED})
_ANY_CALL = tenacity.Retrying()
T = TypeVar("T")


def pause(tries: int, first: float, longest: float) -> float:
    """Seconds to wait after so many tries: random, up to a bound that doubles from `first` to `longest`."""
    state = tenacity.RetryCallState(_ANY_CALL, None, (), {})
    state.attempt_number = tries
    return tenacity.wait_random_exponential(multiplier=first, max=longest, min=first / 2)(state)


async def by_first_reachable(variants: Sequence[Variant], call: Callable[[Variant], Awaitable[T]]) -> T:
    """What `call` returns for the first variant that can be reached. Raises UNAVAILABLE when none can."""
    for served in variants[:-1]:
        try:
            return await call(served)
        except LookonceError as error:
            if error.kind is not ErrorKind.UNAVAILABLE:
                raise
    return await call(variants[-1])


class Attempts(Generic[C]):
    """The tries of one request to one half of the model: one more on another replica (or the same, once it is back),
    one escape from a full replica, one renewal of stale references. Then, while nothing of the answer is out, the next
    variant may stand in."""

    def __init__(
        self, variants: Sequence[Variant], half: Callable[[Variant], Replicas[C]], key: bytes, *, reconnect_wait: float
    ) -> None:
        """`key` chooses the replica; `reconnect_wait`: seconds to wait for one of the last variant to come back."""
        self._half, self._key, self._reconnect_wait = half, key, reconnect_wait
        self._waiting = list(variants[1:])  # variants that may stand in
        self._enter(variants[0])

    def _enter(self, served: Variant) -> None:
        self.served = served
        self.renewed = False  # stale references were made anew
        self._replicas = self._half(served)
        self._avoid: Endpoint[C] | None = None
        self._ready = self._retried = self._escaped = False

    async def prepare(self) -> None:
        """Have at hand what a call to the variant `served` needs."""

    async def renew(self, error: LookonceError) -> bool:
        """Make stale references anew; whether there were any."""
        return False

    def left(self, outcome: str) -> None:
        """Hear what came of the request at the variant `served`."""

    @contextmanager
    def calling(self, endpoint: Endpoint[C]) -> Iterator[C]:
        """The client of an endpoint, for one call."""
        with self._replicas.use(endpoint) as client:
            yield client

    async def run(self, call: Callable[[C], Awaitable[T]]) -> T:
        """What `call` returns. Nothing is shown before its end: a replica that dies midway costs a try."""
        with self._ending():
            while True:
                endpoint: Endpoint[C] | None = None
                try:
                    endpoint = await self._choose()
                    with self.calling(endpoint) as client:
                        result = await call(client)
                except LookonceError as error:
                    await self._recover(error, endpoint)
                else:
                    self._replicas.succeeded(endpoint)
                    return result

    async def stream(self, call: Callable[[C], AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
        """What `call` yields. A failure after the first item is raised."""
        with self._ending():
            while True:
                endpoint: Endpoint[C] | None = None
                started = False
                try:
                    endpoint = await self._choose()
                    with self.calling(endpoint) as client:
                        async with aclosing(call(client)) as items:
                            async for item in items:
                                started = True
                                yield item
                except LookonceError as error:
                    await self._recover(error, endpoint, started=started)
                else:
                    self._replicas.succeeded(endpoint)
                    return

    @contextmanager
    def _ending(self) -> Iterator[None]:
        outcome = "ok"
        try:
            yield
        except LookonceError as error:
            outcome = error.kind.value
            raise
        except (asyncio.CancelledError, GeneratorExit):
            outcome = "cancelled"
            raise
        finally:
            self.left(outcome)

    async def _choose(self) -> Endpoint[C]:
        if not self._ready:
            await self.prepare()
            self._ready = True
        return self._replicas.choose(self._key, self._avoid)

    async def _recover(self, error: LookonceError, endpoint: Endpoint[C] | None, *, started: bool = False) -> None:
        """Return to try again; raise what the caller is to see. `started`: part of the answer is out already."""
        if endpoint is not None:
            if error.kind is ErrorKind.UNAVAILABLE:
                self._replicas.failed(endpoint)
            try:
                if not started and await self._another(error, endpoint):
                    RETRIES.labels(error.kind.value).inc()
                    return
            except LookonceError as failure:
                error = failure
        public = _as_public(error)
        if started or not self._waiting or public.kind is not ErrorKind.UNAVAILABLE:
            raise public from error.__cause__
        self.left(public.kind.value)
        self._enter(self._waiting.pop(0))

    async def _another(self, error: LookonceError, endpoint: Endpoint[C]) -> bool:
        if error.kind is ErrorKind.UNAVAILABLE and not self._retried:
            self._retried, self._avoid = True, endpoint
            seconds = 0.0 if self._waiting else self._reconnect_wait
            return self._replicas.any_live(endpoint) or await self._replicas.wait(seconds)
        if error.kind is ErrorKind.OVERLOADED and not self._escaped and self._replicas.any_live(endpoint):
            self._escaped, self._avoid = True, endpoint
            return True
        if error.kind in STALE and not self.renewed:
            self.renewed = True
            return await self.renew(error)
        return False


class Together:
    """The calls of one request that go out at once. One that finds the service full of the others is tried again. When
    the service takes none of them, it is full of other work: then all of them fail at once."""

    def __init__(self) -> None:
        self._under_way = 0
        self._answered = False
        self._refused: LookonceError | None = None

    async def run(self, call: Callable[[], Awaitable[T]]) -> T:
        """What `call` returns. Raises its failure, OVERLOADED when there is no use in it."""
        tries = 0
        while True:
            self._check(self._refused)
            self._under_way += 1
            try:
                result = await call()
                self._answered = True
                return result
            except LookonceError as error:
                tries += 1
                if error.kind is not ErrorKind.OVERLOADED or tries == BUSY_TRIES:
                    raise
                refusal = error
            finally:
                self._under_way -= 1
            self._refuse(refusal)
            await asyncio.sleep(pause(tries, *BUSY_PAUSES))
            self._refuse(refusal)

    def _check(self, error: LookonceError | None) -> None:
        if self._refused is not None and error is not None and not self._answered:
            raise error

    def _refuse(self, error: LookonceError) -> None:
        """Raise the refusal of a call unless other calls of this request may be what filled the service."""
        if not self._answered and not self._under_way:
            self._refused = error
        self._check(error)


def _as_public(error: LookonceError) -> LookonceError:
    """A service that refuses the gateway's own credentials is out of order to the client, not a fault of theirs."""
    if error.kind in _OURS:
        return LookonceError(ErrorKind.UNAVAILABLE, "a service refused the gateway", retry_after=5.0)
    return error
