"""What an operator allows: which hosts and ports, and how long and how much a fetch may take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lookonce.core.http_fetch.addresses import Network, may_connect, parse_networks
from lookonce.core.http_fetch.refusals import FetchError, Reason, no_usable_address
from lookonce.core.http_fetch.target import Target

FetchMode = Literal["off", "allowlist", "public"]
_LOCAL_DOMAINS = ("localhost", "local", "localdomain", "internal", "intranet", "lan", "home.arpa", "onion")
"""Never names of the public internet (RFC 6761 and common use): not even looked up, unless listed."""


@dataclass(frozen=True)
class FetchPolicy:
    """Rules of fetching. Hosts are names as in URLs; ".example.org" stands for all names below example.org."""

    mode: FetchMode = "public"
    hosts: frozenset[str] = frozenset()  # lower case; read in mode "allowlist" alone
    ports: frozenset[int] = frozenset({80, 443})
    networks: tuple[Network, ...] = field(default=())  # allowed although not public
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


__all__ = ["FetchMode", "FetchPolicy", "parse_hosts", "parse_networks", "parse_ports"]
