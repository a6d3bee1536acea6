"""Endpoints by DNS: the replicas follow what a name stands for, calls under way outlive a change, erasure too."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest
from pydantic import ValidationError

from gateway.routing.replicas import REMEMBERED, Discovery, Name, Replicas, open_replicas, split_targets
from gateway.settings import GatewaySettings
from lookonce.core.errors import ErrorKind, LookonceError
from tests.client.cutter import Cutter
from tests.gateway.conftest import Services
from tests.gateway.processes import GatewayProcess

KEY = b"k" * 32


class StandIn:
    """A client that can be told apart and knows whether it was closed."""

    def __init__(self, address: str, name: str | None) -> None:
        self.address, self.name, self.closed = address, name, False

    async def healthy(self, timeout: float = 2.0) -> bool:
        return True

    async def close(self) -> None:
        self.closed = True


class Zone:
    """A resolver whose answer is what was last put there."""

    def __init__(self, *hosts: str) -> None:
        self.hosts: list[str] | None = list(hosts)

    async def resolve(self, host: str, port: int) -> list[str]:
        if self.hosts is None:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return self.hosts


def follow(zone: Zone, now: list[float], *fixed: str) -> tuple[Replicas[StandIn], Discovery[StandIn]]:
    replicas = Replicas([StandIn(address, None) for address in fixed], clock=lambda: now[0])
    return replicas, Discovery(replicas, [Name("lm.internal", 1)], StandIn, interval=3600, resolve=zone.resolve)


def addresses(replicas: Replicas[StandIn]) -> set[str]:
    return {endpoint.client.address for endpoint in replicas.endpoints}


async def test_replicas_follow_the_name_and_keep_their_images_meanwhile() -> None:
    zone = Zone("192.0.2.1", "192.0.2.2")
    replicas, discovery = follow(zone, [0.0], "static:1")
    await discovery.refresh()
    assert addresses(replicas) == {"static:1", "192.0.2.1:1", "192.0.2.2:1"}
    keys = [bytes([number]) * 32 for number in range(64)]
    homes = {key: replicas.choose(key) for key in keys}
    zone.hosts = ["192.0.2.2", "192.0.2.3", "2001:db8::1"]
    await discovery.refresh()
    assert addresses(replicas) == {"static:1", "192.0.2.2:1", "192.0.2.3:1", "[2001:db8::1]:1"}
    assert {endpoint.client.name for endpoint in replicas.endpoints} == {None, "lm.internal"}
    for key in keys:  # an image moves only to an endpoint that is new, or because its own has gone
        home = replicas.choose(key)
        assert (
            home is homes[key]
            or home.client.address in ("192.0.2.3:1", "[2001:db8::1]:1")
            or homes[key].client.address == "192.0.2.1:1"
        )


async def test_a_name_that_cannot_be_looked_up_keeps_its_endpoints() -> None:
    zone = Zone("192.0.2.1")
    replicas, discovery = follow(zone, [0.0])
    with pytest.raises(LookonceError) as caught:
        replicas.choose(KEY)
    assert caught.value.kind is ErrorKind.UNAVAILABLE and caught.value.retry_after
    await discovery.refresh()
    home = replicas.choose(KEY)
    zone.hosts = None
    await discovery.refresh()
    assert replicas.choose(KEY) is home


async def test_an_endpoint_that_has_gone_ends_its_calls_and_forgets_images_before_it_is_closed() -> None:
    zone, now = Zone("192.0.2.1", "192.0.2.2"), [0.0]
    replicas, discovery = follow(zone, now)
    await discovery.refresh()
    gone = next(endpoint for endpoint in replicas.endpoints if endpoint.client.address == "192.0.2.1:1")
    with replicas.use(gone) as client:
        zone.hosts = ["192.0.2.2"]
        await discovery.refresh()
        assert addresses(replicas) == {"192.0.2.2:1"} and gone in replicas.remembered
        now[0] += REMEMBERED + 1
        await replicas.close_idle()
        assert not client.closed
    await replicas.close_idle()
    assert client.closed and gone not in replicas.remembered


async def test_an_endpoint_that_comes_back_is_the_one_it_was() -> None:
    zone = Zone("192.0.2.1", "192.0.2.2")
    replicas, discovery = follow(zone, [0.0])
    await discovery.refresh()
    before = replicas.choose(KEY)
    zone.hosts = []
    await discovery.refresh()
    zone.hosts = ["192.0.2.2", "192.0.2.1"]
    await discovery.refresh()
    assert replicas.choose(KEY) is before and len(replicas.remembered) == 2


def test_names_and_addresses_are_told_apart() -> None:
    fixed, names = split_targets(["a:1", "unix:/tmp/x", "dns://lm.internal:50052", "dns:///lm:2"])
    assert fixed == ["a:1", "unix:/tmp/x"] and names == [Name("lm.internal", 50052), Name("lm", 2)]
    replicas, _ = open_replicas(["a:1", "dns://b:2"], StandIn, interval=1)
    assert addresses(replicas) == {"a:1"}


@pytest.mark.parametrize("bad", ["dns://", "dns://name", "dns://name:x", "dns://:1", "dns://a/b:1", "dns://a:0"])
def test_a_malformed_name_is_refused_with_its_option(bad: str) -> None:
    with pytest.raises(ValidationError, match=r"--lm: .* must be dns://HOST:PORT"):
        GatewaySettings(lm=bad)


def test_a_gateway_that_finds_its_services_by_name_answers(
    services: Services, image_file: Callable[..., bytes]
) -> None:
    with Cutter(services.vision.address, None) as vision, Cutter(services.language.address, None) as language:
        names = ("--vision", f"dns://localhost:{vision.port}", "--lm", f"dns://localhost:{language.port}")
        with GatewayProcess(*names) as gateway, gateway.client() as http:
            image = http.post("/v1/images", files={"file": image_file()}).raise_for_status().json()["id"]
            asked = {"questions": ["What?"], "max_tokens": 1}
            answers = http.post(f"/v1/images/{image}/questions", json=asked).raise_for_status().json()["answers"]
            assert "text" in answers[0]
            assert {line["name"] for line in gateway.lines("endpoints changed")} == {"localhost"}
