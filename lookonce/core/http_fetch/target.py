"""Reading a URL strictly: whatever two parsers might read differently is refused, not repaired. And what a client is
told when its URL can't be fetched.

Those texts are fixed: no library's words, no addresses. A name that does not resolve and one that resolves to a private
address get the same text, so that nobody maps an internal network by asking.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address
from typing import NoReturn
from urllib.parse import quote, urljoin

from lookonce.core.errors import ErrorKind, LookonceError

Address = IPv4Address | IPv6Address


class Reason(StrEnum):
    """Why a fetch failed: for the log and the counter."""

    MALFORMED = "malformed"
    OFF = "off"
    HOST_NOT_ALLOWED = "host_not_allowed"
    PORT_NOT_ALLOWED = "port_not_allowed"
    UNRESOLVED = "unresolved"
    PRIVATE_ADDRESS = "private_address"
    UNREACHABLE = "unreachable"
    BROKEN = "broken"
    TIMEOUT = "timeout"
    STATUS = "status"
    REDIRECTS = "redirects"
    DOWNGRADE = "downgrade"
    ENCODED = "encoded"
    NOT_AN_IMAGE = "not_an_image"
    EMPTY = "empty"
    TOO_LARGE = "too_large"
    BUSY = "busy"


_KINDS = {
    Reason.TOO_LARGE: (ErrorKind.IMAGE_TOO_LARGE, "image_too_large"),
    Reason.BUSY: (ErrorKind.OVERLOADED, "overloaded"),
}


class FetchError(LookonceError):
    """A URL that can't be fetched; `code` is OpenAI's own. `reason` and `host` are for the log alone."""

    def __init__(self, reason: Reason, message: str, *, param: str, host: str = "") -> None:
        kind, self.code = _KINDS.get(reason, (ErrorKind.INVALID_ARGUMENT, "invalid_image_url"))
        super().__init__(kind, message, param=param)
        self.reason = reason
        self.host = host


def no_usable_address(reason: Reason, param: str, host: str) -> FetchError:
    """One text for an unknown name and for a private address."""
    return FetchError(reason, f"the host of '{param}' has no public address", param=param, host=host)


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
