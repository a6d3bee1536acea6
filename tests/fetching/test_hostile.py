"""Hostile URLs against canaries on loopback: nothing is connected to, and the answer gives nothing away."""

from __future__ import annotations

from ipaddress import ip_network

import pytest

from lookonce.core.http_fetch.fetch_policy import FetchPolicy
from lookonce.core.http_fetch.fetcher import Fetcher, Wanted
from lookonce.core.http_fetch.target import FetchError, Reason
from tests.fetching.hostile import (
    LOCAL_NAMES,
    MALFORMED_ADDRESSES,
    NAMES_OF_PRIVATE_ADDRESSES,
    PRIVATE_ADDRESSES,
    SCHEMES,
    TRICKS,
)
from tests.fetching.servers import ImageServer, Names, answer, redirect

OUTSIDE = (ip_network("127.0.0.2/32"),)
"""Stands for the public internet."""
NO_ADDRESS = "the host of 'url' has no public address"
ELSEWHERE = "'url' redirects to where this server does not fetch from"


def everything_is_here(host: str, port: int) -> list[str]:
    """The worst name server there could be."""
    return ["127.0.0.1"]


@pytest.fixture
def public(canary, roots):
    """A fetcher as it is by default, but for the canary's port; every name is at the canary's address."""
    fetcher = Fetcher(FetchPolicy(ports=frozenset({80, 443, canary.port})), look_up=everything_is_here, tls=roots)
    yield fetcher
    fetcher.close()


async def refused(fetcher, url):
    with pytest.raises(FetchError) as caught:
        await fetcher.fetch(url, param="url", max_bytes=1 << 20)
    return caught.value


def test_there_are_enough_of_them():
    every = {*MALFORMED_ADDRESSES, *TRICKS, *SCHEMES, *PRIVATE_ADDRESSES, *LOCAL_NAMES, *NAMES_OF_PRIVATE_ADDRESSES}
    assert len(every) >= 300


@pytest.mark.parametrize("url", MALFORMED_ADDRESSES + TRICKS + SCHEMES, ids=lambda url: ascii(url)[1:60])
async def test_what_two_parsers_might_read_differently_is_refused(url, public, canary, tried):
    error = await refused(public, url.replace("{port}", str(canary.port)))
    assert error.reason is Reason.MALFORMED
    assert error.message.startswith("'url' ") and len(error.message) < 80
    assert (canary.connections, tried) == (0, [])


@pytest.mark.parametrize("url", PRIVATE_ADDRESSES + LOCAL_NAMES, ids=lambda url: url[7:60])
async def test_addresses_and_names_that_are_not_public_are_refused(url, public, canary, tried):
    error = await refused(public, url.replace("{port}", str(canary.port)))
    assert (error.reason, error.message) == (Reason.PRIVATE_ADDRESS, NO_ADDRESS)
    assert (canary.connections, tried) == (0, [])


@pytest.mark.parametrize("name", NAMES_OF_PRIVATE_ADDRESSES)
async def test_one_private_address_condemns_a_name(name, canary, roots, tried):
    names = Names({host: [addresses] for host, addresses in NAMES_OF_PRIVATE_ADDRESSES.items()})
    fetcher = Fetcher(FetchPolicy(ports=frozenset({canary.port})), look_up=names, tls=roots)
    error = await refused(fetcher, f"http://{name}:{canary.port}/a.png")
    fetcher.close()
    assert error.message == NO_ADDRESS and names.asked == [name]
    assert (canary.connections, tried) == (0, [])


async def test_an_unknown_name_looks_like_a_private_one(canary, roots):
    names = Names({"known.example": [["10.0.0.1"]]})
    fetcher = Fetcher(FetchPolicy(ports=frozenset({canary.port})), look_up=names, tls=roots)
    unknown = await refused(fetcher, f"http://unknown.example:{canary.port}/")
    known = await refused(fetcher, f"http://known.example:{canary.port}/")
    fetcher.close()
    assert (unknown.message, unknown.kind, unknown.code) == (known.message, known.kind, known.code)
    assert (unknown.reason, known.reason) == (Reason.UNRESOLVED, Reason.PRIVATE_ADDRESS)


async def test_the_canary_and_the_record_would_tell(make_fetcher, tried):
    with ImageServer() as server:
        await make_fetcher(server).fetch(f"{server.url}/a.png", param="url", max_bytes=1000)
        assert server.connections == 1
        assert tried == [("socket.connect", ("127.0.0.1", server.port))]


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1:{port}/", "http://localhost:{port}/", "http://[::1]:{port}/", "http://[::ffff:127.0.0.1]:{port}/",
        "//127.0.0.1:{port}/", "http://2130706433:{port}/", "http://0x7f.1:{port}/", "http://user@127.0.0.1:{port}/",
        "http://inside.example:{port}/", "http://127.0.0.1\\@127.0.0.2:{port}/", "\\\\127.0.0.1:{port}/",
        "http://169.254.169.254/latest/meta-data/", "file:///etc/passwd", "gopher://127.0.0.1:{port}/_x", "data:,x", "",
        "http://127.0.0.1:{port}/\x01", "http://127.0.0.2:22/", "ftp://127.0.0.1:{port}/", "http://127.0.0.1:{port}/\xff",
    ],
)  # fmt: skip
@pytest.mark.parametrize("status", [302, 307])
async def test_redirects_to_private_addresses(location, status, canary, make_fetcher, tried):
    names = Names({"inside.example": [["127.0.0.1"]]})
    with ImageServer(
        {"/go": redirect(location.replace("{port}", str(canary.port)), status)}, host="127.0.0.2"
    ) as outside:
        fetcher = make_fetcher(outside, canary, names=names, networks=OUTSIDE)
        error = await refused(fetcher, f"{outside.url}/go")
    assert error.message in (ELSEWHERE, NO_ADDRESS)
    assert canary.connections == 0
    assert [entry for entry in tried if entry[1][0] != "127.0.0.2"] == []


async def test_a_name_that_changes_its_address_after_the_check(canary, make_fetcher, tried):
    names = Names({"rebind.example": [["127.0.0.2"], ["127.0.0.1"]]})
    with ImageServer({"/a.png": answer(b"outside")}, host="127.0.0.2") as outside:
        fetcher = make_fetcher(outside, canary, names=names, networks=OUTSIDE)
        assert (
            await fetcher.fetch(f"http://rebind.example:{outside.port}/a.png", param="url", max_bytes=99) == b"outside"
        )
        assert names.asked == ["rebind.example"]  # once: there is no second answer to fall for
        error = await refused(fetcher, f"http://rebind.example:{canary.port}/a.png")
    assert error.message == NO_ADDRESS and names.asked == ["rebind.example"] * 2
    assert canary.connections == 0
    assert tried == [("socket.connect", ("127.0.0.2", outside.port))]


async def test_a_name_that_changes_its_address_between_hops(canary, make_fetcher):
    names = Names({"rebind.example": [["127.0.0.2"], ["127.0.0.1"]]})
    routes = {"/go": redirect("/a.png"), "/a.png": answer()}
    with ImageServer(routes, host="127.0.0.2") as outside, ImageServer(routes) as inside:
        fetcher = make_fetcher(outside, canary, inside, names=names, networks=OUTSIDE)
        error = await refused(fetcher, f"http://rebind.example:{outside.port}/go")
        assert (error.message, outside.targets, inside.connections) == (NO_ADDRESS, ["/go"], 0)


@pytest.mark.parametrize(
    "hostile", ["http://127.1/", "http://10.0.0.1/", "http://[::ffff:127.0.0.1]/", "http://x.example:22/"]
)
async def test_no_connection_is_made_when_one_of_many_urls_is_hostile(hostile, server, make_fetcher, tried):
    wanted = [Wanted(f"{server.url}/a.png", "first"), Wanted(hostile, "second")]
    with pytest.raises(FetchError) as caught:
        await make_fetcher(server, ports=frozenset({80, server.port})).fetch_all(
            wanted, max_bytes=1000, total_bytes=1000
        )
    assert caught.value.param == "second"
    assert (server.connections, tried) == (0, [])


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HTTPS_PROXY"])
async def test_proxies_of_the_environment_are_ignored(variable, monkeypatch, server, canary, make_fetcher):
    monkeypatch.setenv(variable, f"http://127.0.0.1:{canary.port}")
    assert await make_fetcher(server).fetch(f"{server.url}/a.png", param="url", max_bytes=1000)
    assert canary.connections == 0


@pytest.mark.parametrize("port", [22, 25, 6379, 8080, 11211])
async def test_other_ports_than_the_web_s_are_refused(port, roots, tried):
    fetcher = Fetcher(FetchPolicy(), look_up=Names(), tls=roots)
    error = await refused(fetcher, f"http://images.example:{port}/")
    fetcher.close()
    assert error.reason is Reason.PORT_NOT_ALLOWED and tried == []
