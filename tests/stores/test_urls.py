"""Store URLs, sizes and durations: what is understood, and what a wrong one says."""

from __future__ import annotations

import pytest

from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.stores import open_store
from lookonce.core.stores.memory import MemoryStore
from lookonce.core.stores.tiered import TieredStore
from lookonce.core.stores.wrappers import CircuitBreaker
from lookonce.core.units import format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("512MiB", 512 * 2**20), ("2GiB", 2**31), ("1.5 kb", 1500), ("3tib", 3 * 2**40), (4096, 4096)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30s", 30),
        ("10m", 600),
        ("12h", 43200),
        ("7d", 604800),
        ("1w", 604800),
        ("250ms", 0.25),
        ("90", 90),
        (1.5, 1.5),
    ],
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "x", "-1", "1 furlong", "1e9", "0", "nan", "inf", "１"])
@pytest.mark.parametrize("parse", [parse_size, parse_duration])
def test_nonsense_names_the_setting(parse, text):
    with pytest.raises(LookonceError) as caught:
        parse(text, param="cache_size")
    assert caught.value.kind is ErrorKind.INVALID_ARGUMENT
    assert caught.value.param == "cache_size"
    assert caught.value.message.startswith("cache_size must be")


def test_sizes_are_written_readably():
    assert [format_size(n) for n in (512, 1536, 5 * 2**30, 2**42)] == ["512 B", "1.5 KiB", "5.0 GiB", "4.0 TiB"]


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("", "memory://"),
        ("nonsense", "scheme"),
        ("http://host", "scheme 'http'"),
        ("memory://host", "host"),
        ("memory://?max_bytes=lots", "max_bytes"),
        ("memory://?ttl=soon", "ttl"),
        ("memory://?colour=red", "'colour'"),
        ("memory://?ttl=1d&ttl=2d", "twice"),
        ("file://", "absolute path"),
        ("file://relative/path", "absolute path"),
        ("file:///", "absolute path"),
        ("redis://", "host"),
        ("redis://host:port", "port"),
        ("redis://host:99999", "port"),
        ("redis://host/name", "database"),
        ("redis://host?db=-1", "db"),
        ("redis://host?max_bytes=1GiB", "'max_bytes'"),
        ("redis://host?socket_timeout=never", "socket_timeout"),
        ("redis://host?ssl_ca_certs=/ca.pem", "rediss://"),
        ("rediss://host?ssl_cert_reqs=perhaps", "ssl_cert_reqs"),
        ("redis+sentinel://host:26379", "service"),
        ("redis+sentinel://host:x/service", "port"),
        ("memory:// gopher://host", "gopher"),
    ],
)
def test_a_bad_url_names_the_part_at_fault(url, word):
    with pytest.raises(LookonceError) as caught:
        open_store(url)
    assert caught.value.kind is ErrorKind.INVALID_ARGUMENT
    assert word in caught.value.message


def test_an_error_never_tells_the_password():
    with pytest.raises(LookonceError) as caught:
        open_store("redis://user:hunter2@host:bad")
    assert "hunter2" not in caught.value.message


@pytest.mark.parametrize("namespace", ["", "../up", "A", "x" * 65, "a/b"])
def test_a_namespace_never_becomes_a_path(namespace):
    with pytest.raises(LookonceError, match="namespace"):
        open_store("memory://", namespace=namespace)


async def test_kinds(tmp_path):
    urls = {
        "memory://": MemoryStore,
        f"file://{tmp_path}/s": CircuitBreaker,
        "redis://user:password@host:1/3?socket_timeout=1s&max_connections=4&ttl=1d": CircuitBreaker,
        "rediss://host?ssl_cert_reqs=required&ssl_check_hostname=true": CircuitBreaker,
        "redis+cluster://host:7000": CircuitBreaker,
        "rediss+cluster://host:7000": CircuitBreaker,
        "redis+sentinel://u:p@a:26379,b/service": CircuitBreaker,
        "memory:// redis://host": TieredStore,
    }
    for url, kind in urls.items():
        store = open_store(url)
        assert type(store) is kind, url
        await store.close()


async def test_the_query_overrides_the_defaults():
    store = open_store("memory://?max_bytes=1KiB", max_bytes=1 << 20)
    assert not await store.put(b"key", bytes(2000))
    store = open_store("memory://", max_bytes=1 << 20)
    assert await store.put(b"key", bytes(2000))
