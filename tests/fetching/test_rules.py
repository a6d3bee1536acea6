"""What is public, what is allowed, how a URL is read, and how operators say so."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from gateway.settings import GatewaySettings
from lookonce.core.errors import LookonceError
from lookonce.core.http_fetch import fetch_policy
from lookonce.core.http_fetch.fetch_policy import FetchPolicy, is_public, may_connect, own_addresses
from lookonce.core.http_fetch.pinned_connection import tls_context
from lookonce.core.http_fetch.target import FetchError, follow, parse_target


@pytest.mark.parametrize(
    "text",
    ["1.1.1.1", "8.8.8.8", "93.184.215.14", "172.32.0.1", "100.128.0.1", "198.20.0.1",
     "223.255.255.254", "168.63.129.17",
     "2606:4700::1111", "2a00:1450:4001:800::200e", "2400:cb00::1", "2001:4860:4860::8888", "2003::1"],
)  # fmt: skip
def test_public_addresses(text):
    assert is_public(ip_address(text)) and may_connect(ip_address(text), ())


@pytest.mark.parametrize("text", fetch_policy._NEVER_V4 + fetch_policy._NEVER_V6)
def test_both_ends_of_special_networks_are_not_public(text):
    assert not is_public(text[0]) and not is_public(text[-1])


def test_this_machine_s_own_public_address_is_refused(monkeypatch):
    entry = SimpleNamespace(address="93.184.215.14"), SimpleNamespace(address="00:11:22:33:44:55")
    six = (SimpleNamespace(address="2606:4700::1111%eth0"),)
    monkeypatch.setattr(fetch_policy.psutil, "net_if_addrs", lambda: {"eth0": entry, "eth1": six})
    assert not may_connect(ip_address("93.184.215.14"), ())
    assert not may_connect(ip_address("2606:4700::1111"), ())
    assert may_connect(ip_address("93.184.215.15"), ())
    assert may_connect(ip_address("93.184.215.14"), (ip_network("93.184.215.14/32"),))


def test_own_addresses_are_seen():
    assert ip_address("127.0.0.1") in own_addresses()


def test_an_allowed_network_allows_no_more_than_itself():
    allowed = (ip_network("127.0.0.1/32"), ip_network("fd00::/8"))
    assert may_connect(ip_address("127.0.0.1"), allowed) and may_connect(ip_address("fd00::1"), allowed)
    for text in ("127.0.0.2", "::ffff:127.0.0.1", "::1", "64:ff9b::7f00:1", "fc00::1", "2002:7f00:1::"):
        assert not may_connect(ip_address(text), allowed)


@pytest.mark.parametrize(
    ("url", "understood", "host", "port"),
    [
        ("http://example.org", "http://example.org/", "example.org", 80),
        ("HTTPS://Example.ORG:443/A?b=c#d", "https://example.org/A?b=c", "example.org", 443),
        ("http://example.org:443/", "http://example.org:443/", "example.org", 443),
        ("http://example.org:080/", "http://example.org/", "example.org", 80),
        ("http://example.org?x=1", "http://example.org/?x=1", "example.org", 80),
        ("http://example.org#@127.0.0.1", "http://example.org/", "example.org", 80),
        ("http://example.org/a@b:c//d/../e", "http://example.org/a@b:c//d/../e", "example.org", 80),
        ("http://example.org/\u00e9?\u20ac='%20'", "http://example.org/%C3%A9?%E2%82%AC='%20'", "example.org", 80),
        ("http://xn--bcher-kva.example/", "http://xn--bcher-kva.example/", "xn--bcher-kva.example", 80),
        ("http://a_b.s3-1.example/", "http://a_b.s3-1.example/", "a_b.s3-1.example", 80),
        ("http://1.2.3.4:8080/", "http://1.2.3.4:8080/", "1.2.3.4", 8080),
        ("http://[2606:4700:0::1111]/", "http://[2606:4700::1111]/", "2606:4700::1111", 80),
        ("https://[2606:4700::1]:8443/x", "https://[2606:4700::1]:8443/x", "2606:4700::1", 8443),
        ("http://1e100.example/", "http://1e100.example/", "1e100.example", 80),
    ],
)  # fmt: skip
def test_urls_are_understood(url, understood, host, port):
    target = parse_target(url, "url")
    assert (target.url, target.host, target.port) == (understood, host, port)
    assert parse_target(target.url, "url") == target


@pytest.mark.parametrize(
    ("location", "url"),
    [
        ("b?c#d", "https://example.org/x/b?c"), ("/b", "https://example.org/b"), ("../b", "https://example.org/b"),
        ("//b.example/c", "https://b.example/c"), ("http://b.example", "http://b.example/"),
        ("?q", "https://example.org/x/a?q"),
        ("/\u00e9", "https://example.org/%C3%A9"),
    ],
)  # fmt: skip
def test_locations_are_understood(location, url):
    assert follow(parse_target("https://example.org/x/a?z", "url"), location, "url").url == url


@pytest.mark.parametrize("location", ["", "\\b", "/a b", "javascript:x", "//u@b.example", "//0x7f.1", "/\r\nx: y"])
def test_bad_locations(location):
    with pytest.raises(FetchError):
        follow(parse_target("https://example.org/", "url"), location, "url")


def test_the_default_is_any_public_address_and_nothing_else():
    policy = GatewaySettings().fetch_policy
    assert policy == FetchPolicy(mode="public", ports=frozenset({80, 443}), hosts=frozenset(), networks=(), ca=None)
    assert policy == FetchPolicy()


def test_settings_become_the_policy(tmp_path):
    settings = GatewaySettings(
        fetch_urls="allowlist", fetch_hosts="A.example, .B.example", fetch_ports="443,8443", fetch_redirects=1,
        fetch_allow_networks="10.1.0.0/16,fd00::/8", fetch_ca=tmp_path / "ca", fetch_timeout=3, fetch_connect_timeout=1,
        fetch_read_timeout=2, fetch_concurrency=5,
    )  # fmt: skip
    assert settings.fetch_policy == FetchPolicy(
        mode="allowlist", hosts=frozenset({"a.example", ".b.example"}), ports=frozenset({443, 8443}), max_redirects=1,
        networks=(ip_network("10.1.0.0/16"), ip_network("fd00::/8")), ca=tmp_path / "ca", timeout=3, connect_timeout=1,
        read_timeout=2, concurrency=5,
    )  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [
        {"fetch_urls": "yes"}, {"fetch_urls": "allowlist"}, {"fetch_hosts": "a.example"},
        {"fetch_urls": "allowlist", "fetch_hosts": "http://a.example"},
        {"fetch_urls": "allowlist", "fetch_hosts": "*.a"},
        {"fetch_urls": "allowlist", "fetch_hosts": "."}, {"fetch_ports": "0"}, {"fetch_ports": "http"},
        {"fetch_ports": "65536"}, {"fetch_allow_networks": "10.0.0.1/8"}, {"fetch_allow_networks": "localhost"},
        {"fetch_redirects": 11}, {"fetch_timeout": 0}, {"fetch_concurrency": 0}, {"max_urls": 0},
    ],
)  # fmt: skip
def test_bad_settings_stop_the_start(fields):
    with pytest.raises(ValidationError):
        GatewaySettings(**fields)


def test_bad_roots_stop_the_start(tmp_path):
    (tmp_path / "ca.pem").write_text("no certificate")
    for name in ("ca.pem", "missing.pem"):
        with pytest.raises(LookonceError, match="--fetch-ca"):
            tls_context(FetchPolicy(ca=tmp_path / name))
