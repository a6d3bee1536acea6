"""How often a request is tried: one policy over replicas and variants, and over questions that go out together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from gateway.routing.replicas import Replicas
from gateway.routing.retries import BUSY_TRIES, Attempts, Together, pause
from gateway.routing.variants import Variant, VariantSpec
from lookonce.core.errors import ErrorKind, LookonceError


class Client:
    """A service that fails in turn with these kinds, then answers."""

    def __init__(self, address: str, *failures: ErrorKind) -> None:
        self.address = address
        self.failures = list(failures)
        self.calls = 0

    async def call(self) -> str:
        self.calls += 1
        if self.failures:
            raise LookonceError(self.failures.pop(0), self.address)
        return self.address

    async def stream(self) -> AsyncGenerator[str, None]:
        yield await self.call()
        yield await self.call()

    async def healthy(self, timeout: float = 2.0) -> bool:
        return not self.failures

    async def close(self) -> None:
        pass


class Recorded(Attempts[Client]):
    def __init__(self, *variants: list[Client], renews: bool = True) -> None:
        self.outcomes: list[str] = []
        self.renewals = 0
        self.renews = renews
        served = [
            Variant(VariantSpec(f"v{number}", 1.0, (), ()), Replicas(clients), Replicas(clients))  # type: ignore[arg-type]
            for number, clients in enumerate(variants)
        ]
        super().__init__(served, lambda variant: variant.vision, b"key", reconnect_wait=0.0)  # type: ignore[arg-type, return-value]

    async def renew(self, error: LookonceError) -> bool:
        self.renewals += 1
        return self.renews

    def left(self, outcome: str) -> None:
        self.outcomes.append(f"{self.served.name} {outcome}")


GONE, FULL, LOST = ErrorKind.UNAVAILABLE, ErrorKind.OVERLOADED, ErrorKind.EMBEDDING_MISSING


async def test_a_dead_replica_is_replaced_once_and_then_a_variant_stands_in() -> None:
    dead, other = [Client("a", *[GONE] * 9), Client("b", *[GONE] * 9)], [Client("c")]
    attempts = Recorded(dead, other)
    assert await attempts.run(Client.call) == "c"
    assert [client.calls for client in dead] == [1, 1] and attempts.outcomes == ["v0 unavailable", "v1 ok"]


async def test_the_last_failure_is_told_when_nothing_can_stand_in() -> None:
    attempts = Recorded([Client("a", GONE, GONE)], [Client("b", GONE, GONE)])
    with pytest.raises(LookonceError, match="b"):
        await attempts.run(Client.call)
    assert attempts.outcomes == ["v0 unavailable", "v1 unavailable"]


async def test_a_full_replica_is_escaped_once() -> None:
    clients = [Client("a", FULL), Client("b", FULL), Client("c", FULL)]
    with pytest.raises(LookonceError) as raised:
        await Recorded(clients).run(Client.call)
    assert raised.value.kind is FULL and sum(client.calls for client in clients) == 2


@pytest.mark.parametrize(("lost", "renews", "good"), [(1, True, True), (2, True, False), (1, False, False)])
async def test_a_stale_reference_is_renewed_once(lost: int, renews: bool, good: bool) -> None:
    client = Client("a", *[LOST] * lost)
    attempts = Recorded([client], renews=renews)
    if good:
        assert await attempts.run(Client.call) == "a"
    else:
        with pytest.raises(LookonceError):
            await attempts.run(Client.call)
    assert attempts.renewals == 1 and client.calls == (2 if renews else 1)


async def test_a_service_that_refuses_the_gateway_is_out_of_order() -> None:
    attempts = Recorded([Client("a", ErrorKind.PERMISSION_DENIED)], [Client("b", ErrorKind.UNAUTHENTICATED)])
    with pytest.raises(LookonceError) as raised:
        await attempts.run(Client.call)
    assert raised.value.kind is GONE and len(attempts.outcomes) == 2


async def test_a_stream_that_has_begun_is_not_begun_again() -> None:
    client = Client("a")
    items = Recorded([client], [Client("b")]).stream(Client.stream)
    assert await anext(items) == "a"
    client.failures = [GONE]
    with pytest.raises(LookonceError):
        await anext(items)
    assert client.calls == 2


async def test_questions_of_a_request_wait_for_each_other_but_not_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.routing.retries.BUSY_PAUSES", (0.001, 0.002))
    room = asyncio.Semaphore(1)
    tries = 0

    async def one() -> str:
        if room.locked():
            raise LookonceError(FULL, "full")
        async with room:
            await asyncio.sleep(0.002)
            return "answered"

    async def refused() -> str:
        nonlocal tries
        tries += 1
        raise LookonceError(FULL, "full")

    together = Together()
    assert await asyncio.gather(together.run(one), together.run(one)) == ["answered"] * 2
    with pytest.raises(LookonceError):
        await together.run(refused)
    assert tries == BUSY_TRIES  # this request's own answers show that there is room at times
    unanswered, tries = Together(), 0
    # The service is full of other work: one refusal with nothing under way tells all.
    outcomes = await asyncio.gather(*(unanswered.run(refused) for _ in range(5)), return_exceptions=True)
    assert all(isinstance(outcome, LookonceError) for outcome in outcomes) and tries == 1


def test_pauses_are_drawn_up_to_a_bound_that_doubles() -> None:
    for tries, most in ((1, 0.1), (3, 0.4), (9, 2.0)):
        drawn = [pause(tries, 0.1, 2.0) for _ in range(200)]
        assert min(drawn) >= 0.05 and max(drawn) <= most and len(set(drawn)) > 100
