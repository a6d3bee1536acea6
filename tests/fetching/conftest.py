"""Canaries, image servers, and a record of every connection that is tried."""

from __future__ import annotations

import ssl
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from lookonce.core.http_fetch.fetch_policy import FetchPolicy
from lookonce.core.http_fetch.fetcher import Fetcher
from lookonce.core.http_fetch.pinned_connection import tls_context
from tests.fetching.servers import Canary, Certificates, ImageServer, LoopbackServer, Names, make_certificates

LOOPBACK = (ip_network("127.0.0.0/8"), ip_network("::1/128"))
_tried: list[Any] = []
_listening = False


def _on_event(event: str, arguments: tuple[Any, ...]) -> None:
    if _listening and event in ("socket.connect", "socket.getaddrinfo"):
        _tried.append((event, arguments[-1] if event == "socket.connect" else arguments[0]))


sys.addaudithook(_on_event)


@pytest.fixture
def tried() -> Iterator[list[Any]]:
    """Every connection and look-up that this process tries during the test, whether or not it succeeds."""
    global _listening
    _tried.clear()
    _listening = True
    yield _tried
    _listening = False


@pytest.fixture(scope="session")
def canary() -> Iterator[Canary]:
    with Canary() as server:
        yield server


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    directory: Path = tmp_path_factory.mktemp("certificates")
    return make_certificates(directory, "images.example", "127.0.0.1", "::1")


@pytest.fixture
def server() -> Iterator[ImageServer]:
    with ImageServer() as server:
        yield server


def local_policy(*servers: LoopbackServer, **fields: Any) -> FetchPolicy:
    """Loopback allowed, and the ports of these servers."""
    limits = {"timeout": 120.0, "connect_timeout": 60.0, "read_timeout": 60.0, "networks": LOOPBACK}
    return FetchPolicy(**limits | {"ports": frozenset(server.port for server in servers)} | fields)


@pytest.fixture(scope="session")
def roots(certificates: Certificates) -> ssl.SSLContext:
    """Reading the system's roots is slow: once for all fetchers."""
    return tls_context(FetchPolicy(ca=certificates.ca))


@pytest.fixture
def make_fetcher(roots: ssl.SSLContext) -> Iterator[Callable[..., Fetcher]]:
    """Makes fetchers that may go to loopback; closes them."""
    with ExitStack() as stack:

        def make(*servers: LoopbackServer, names: Names | None = None, **fields: Any) -> Fetcher:
            fetcher = Fetcher(local_policy(*servers, **fields), look_up=names or Names(), tls=roots)
            return stack.enter_context(closing(fetcher))

        yield make
