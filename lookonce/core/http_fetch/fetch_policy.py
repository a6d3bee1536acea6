"""What may be fetched, and how much: hosts and ports that an operator allows, and public addresses of other machines.

The lists of addresses follow IANA's special-purpose registries (RFC 6890 and its updates). They stand beside
`ipaddress.is_global`, whose answer has changed between Python versions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Literal

import psutil

from lookonce.core.http_fetch.target import Address, FetchError, Reason, Target, no_usable_address

Network = IPv4Network | IPv6Network

_NEVER_V4 = tuple(
    IPv4Network(text)
    for text in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # carrier-grade NAT; some clouds' metadata
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # a cloud's host agent, although the address is a public one
        "169.254.0.0/16",  # link-local; most clouds' metadata
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments; a cloud's metadata
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # multicast tunnels
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "192.175.48.0/24",  # AS112
        "198.18.0.0/15",  # benchmarking
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
)
_UNICAST_V6 = IPv6Network("2000::/3")
"""All that is allocated; outside lie loopback, mapped IPv4, NAT64, unique local, link-local, multicast."""
_NEVER_V6 = tuple(
    IPv6Network(text)
    for text in (
        "2001::/23",  # protocol assignments, Teredo among them
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: an IPv4 address inside
        "2620:4f:8000::/48",  # AS112
        "3fff::/20",  # documentation
        "3ffe::/16",  # returned
    )
)
_ISATAP = (0x00005EFE, 0x02005EFE)
"""Bits 64 to 96 of an address that holds an IPv4 one (RFC 5214)."""


def parse_networks(texts: Iterable[str]) -> tuple[Network, ...]:
    """Networks such as 10.1.0.0/16 or fd00::/8. Raises ValueError naming the bad one."""
    networks = []
    for text in texts:
        try:
            networks.append(ip_network(text))
        except ValueError:
            raise ValueError(f"{text!r} is not a network such as 10.1.0.0/16") from None
    return tuple(networks)


def is_public(address: Address) -> bool:
    """Whether the address is a unicast one of the public internet, with no other address inside it."""
    if isinstance(address, IPv4Address):
        return address.is_global and not any(address in network for network in _NEVER_V4)
    if address.scope_id is not None or address not in _UNICAST_V6 or not address.is_global:
        return False
    if (int(address) >> 32) & 0xFFFFFFFF in _ISATAP:
        return False
    return not any(address in network for network in _NEVER_V6)


def may_connect(address: Address, allowed: Sequence[Network]) -> bool:
    """Whether a fetch may go there: to a public address of another machine, or where the operator said so."""
    if any(address.version == network.version and address in network for network in allowed):
        return True
    return is_public(address) and address not in own_addresses()


def own_addresses() -> frozenset[Address]:
    """Addresses of this machine's interfaces: from inside they pass the firewall that guards them from outside."""
    found = set()
    for entries in psutil.net_if_addrs().values():
        for entry in entries:
            try:
                found.add(ip_address(entry.address.partition("%")[0]))
            except ValueError:
                continue  # a hardware address
    return frozenset(found)


FetchMode = Literal["off", "allowlist", "public"]
_LOCAL_DOMAINS = ("localhost", "local", "localdomain", "internal", "intranet", "lan", "home.arpa", "onion")
"""Never names of the public internet (RFC 6761 and common use): not even looked up, unless listed."""


@dataclass(frozen=True)
class FetchPolicy:
    """Rules of fetching. Hosts are names as in URLs; ".example.org" stands for all names below example.org."""

    mode: FetchMode = "public"
    hosts: frozenset[str] = frozenset()  # lower case; read in mode "allowlist" alone
    ports: frozenset[int] = frozenset({80, 443})
    networks: tuple[Network, ...] = ()  # allowed although not public
    ca: Path | None = None  # PEM roots beside the system's
    max_redirects: int = 3
    timeout: float = 15.0  # seconds, from the first look-up to the last byte
    connect_timeout: float = 5.0  # seconds for the look-up, and again for connecting
    read_timeout: float = 5.0  # seconds between two pieces
    concurrency: int = 32  # fetches under way in the whole process
    per_owner: int = 16  # fetches under way for one owner (a tenant)
    per_request: int = 8  # fetches under way for one request

    def check(self, target: Target, param: str) -> None:
        """What can be said before any look-up. Raises FetchError."""
        if self.mode == "off":
            text = f"fetching URLs is switched off on this server: '{param}' must hold the image itself"
            raise FetchError(Reason.OFF, text, param=param)
        if target.port not in self.ports:
            text = f"'{param}' has port {target.port}, which may not be fetched from"
            raise FetchError(Reason.PORT_NOT_ALLOWED, text, param=param, host=target.host)
        if self.mode == "allowlist" and not self._listed(target.host):
            text = f"the host of '{param}' is not one that this server fetches from"
            raise FetchError(Reason.HOST_NOT_ALLOWED, text, param=param, host=target.host)
        if target.address is not None:
            if not may_connect(target.address, self.networks):
                raise no_usable_address(Reason.PRIVATE_ADDRESS, param, target.host)
        elif self.mode == "public" and _is_local_name(target.host):
            raise no_usable_address(Reason.PRIVATE_ADDRESS, param, target.host)

    def _listed(self, host: str) -> bool:
        parts = host.split(".")
        above = ("." + ".".join(parts[cut:]) for cut in range(1, len(parts)))
        return host in self.hosts or any(suffix in self.hosts for suffix in above)


def _is_local_name(host: str) -> bool:
    return "." not in host or any(host.endswith("." + domain) for domain in _LOCAL_DOMAINS)


def parse_hosts(texts: Iterable[str]) -> frozenset[str]:
    """Host names, addresses and .suffixes. Raises ValueError for what is none of them."""
    hosts = frozenset(text.lower().strip("[]") for text in texts)
    for host in hosts:
        if not host.isascii() or not host.strip(".") or host.endswith(".") or set(host) & set("/*@\\ %?#"):
            raise ValueError(f"{host!r} is not a host such as images.example.org or a suffix such as .example.org")
    return hosts


def parse_ports(texts: Iterable[str]) -> frozenset[int]:
    """Port numbers. Raises ValueError for what is none."""
    ports = set()
    for text in texts:
        if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 65535):
            raise ValueError(f"{text!r} is not a port from 1 to 65535")
        ports.add(int(text))
    return frozenset(ports)
