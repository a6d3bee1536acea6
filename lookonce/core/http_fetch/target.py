"""Reading a URL strictly: whatever two parsers might read differently is refused, not repaired."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import NoReturn
from urllib.parse import quote, urljoin

from lookonce.core.http_fetch.addresses import Address
from lookonce.core.http_fetch.refusals import FetchError, Reason

MAX_URL_CHARS = 8192
DEFAULT_PORTS = {"http": 80, "https": 443}
_URL = re.compile(r"(https?)://([^/?#]*)([^#]*)(?:#.*)?", re.IGNORECASE)
_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([0-9]{1,5}))?", re.IGNORECASE)
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMERIC = re.compile(r"[0-9]+|0x[0-9a-f]*")
_BAD_ESCAPE = re.compile(r"%(?![0-9a-fA-F]{2})")
_PATH_SAFE = "/?%:@!$&'()*+,;=-._~[]|{}^`"


@dataclass(frozen=True)
class Target:
    """Where a URL leads: what is connected to, asked for and shown as Host."""

    scheme: str  # "http" | "https"
    host: str  # lower case; an IPv6 address without brackets
    port: int
    path: str  # with the query, percent-encoded, begins with "/"
    address: Address | None  # when the host is an address

    @property
    def authority(self) -> str:
        """The Host header: the port only where it is not the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """The URL as it was understood."""
        return f"{self.scheme}://{self.authority}{self.path}"


def parse_target(url: str, param: str) -> Target:
    """Read an absolute http(s) URL. Raises FetchError naming what is wrong with it."""
    _check_characters(url, param)
    match = _URL.fullmatch(url)
    if match is None:
        _refuse(param, "must be an http:// or https:// URL")
    scheme, authority, path = match[1].lower(), match[2], match[3]
    host, port = _read_authority(authority, param)
    address = _read_address(host, param)
    if _BAD_ESCAPE.search(path):
        _refuse(param, "has a '%' that begins no escape")
    path = quote(path if path.startswith("/") else "/" + path, safe=_PATH_SAFE)
    name = host.strip("[]") if address is None else str(address)
    return Target(scheme, name, DEFAULT_PORTS[scheme] if port is None else port, path, address)


def follow(target: Target, location: str, param: str) -> Target:
    """Where a redirect leads, read as strictly as the URL itself."""
    _check_characters(location, param)
    return parse_target(urljoin(target.url, location), param)


def _check_characters(url: str, param: str) -> None:
    if not url or len(url) > MAX_URL_CHARS:
        _refuse(param, f"must have 1 to {MAX_URL_CHARS} characters")
    if "\\" in url:
        _refuse(param, "must not contain a backslash")
    if not all(char.isprintable() and not char.isspace() for char in url):
        _refuse(param, "must not contain spaces or control characters")


def _read_authority(authority: str, param: str) -> tuple[str, int | None]:
    if "@" in authority:
        _refuse(param, "must not contain a user name or password")
    if not authority.isascii():
        _refuse(param, "has a host outside ASCII: write it in its xn-- form")
    match = _AUTHORITY.fullmatch(authority)
    if match is None:
        _refuse(param, "has a malformed host or port")
    port = None if match[2] is None else int(match[2])
    if port is not None and not 1 <= port <= 65535:
        _refuse(param, "has a malformed host or port")
    return match[1].lower(), port


def _read_address(host: str, param: str) -> Address | None:
    """The address that the host is, None for a name. Only the usual way to write an address is taken: no shortened,
    octal, hexadecimal or single-number IPv4, no IPv4 inside IPv6."""
    if host.startswith("["):
        try:
            return IPv6Address(host[1:-1])
        except ValueError:
            _refuse(param, "has a malformed IPv6 address")
    labels = host.split(".")
    if _NUMERIC.fullmatch(labels[-1]):
        try:
            return IPv4Address(host)
        except ValueError:
            _refuse(param, "has a malformed IPv4 address: write four decimal numbers")
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        _refuse(param, "has a malformed host or port")
    return None


def _refuse(param: str, problem: str) -> NoReturn:
    raise FetchError(Reason.MALFORMED, f"'{param}' {problem}", param=param)
