"""Every kind of store, opened by URL, on real servers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.valkey import PATIENT, TlsFront, ValkeyServer, one_node_cluster

KINDS = ["memory", "embedded", "redis", "tls", "cluster", "tiered-redis", "tiered-embedded"]


@pytest.fixture(scope="session")
def valkey() -> Iterator[ValkeyServer]:
    """A server that tests share and leave running."""
    with ValkeyServer() as server:
        yield server


@pytest.fixture(scope="session")
def valkey_cluster() -> Iterator[ValkeyServer]:
    with one_node_cluster() as server:
        yield server


@pytest.fixture(scope="session")
def tls_front(valkey, tmp_path_factory) -> Iterator[TlsFront]:
    with TlsFront(valkey, tmp_path_factory.mktemp("tls")) as front:
        yield front


@pytest.fixture
def own_valkey() -> Iterator[ValkeyServer]:
    """A server that the test may kill."""
    with ValkeyServer() as server:
        yield server


@pytest.fixture(params=KINDS)
def store_url(request, tmp_path) -> str:
    """URL of each kind of store in turn."""
    kind = request.param
    if kind == "memory":
        return "memory://?max_bytes=64MiB"
    if kind.endswith("embedded"):
        return ("memory:// " if kind.startswith("tiered") else "") + f"file://{tmp_path}/store?max_bytes=64MiB"
    if kind == "cluster":
        return request.getfixturevalue("valkey_cluster").url.replace("redis://", "redis+cluster://") + "?" + PATIENT
    if kind == "tls":
        front = request.getfixturevalue("tls_front")
        return f"rediss://127.0.0.1:{front.port}?ssl_ca_certs={front.certificate}&{PATIENT}"
    near = "memory:// " if kind.startswith("tiered") else ""
    return f"{near}{request.getfixturevalue('valkey').url}?{PATIENT}"
