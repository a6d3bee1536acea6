"""What a client is told when its URL can't be fetched. The texts are fixed: no library's words, no addresses.

A name that does not resolve and one that resolves to a private address get the same text, so that nobody maps an
internal network by asking.
"""

from __future__ import annotations

from enum import StrEnum

from lookonce.core.errors import ErrorKind, LookonceError


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


class FetchError(LookonceError):
    """A URL that can't be fetched; has OpenAI's own code. `reason` and `host` are for the log alone."""

    code = "invalid_image_url"

    def __init__(
        self, reason: Reason, message: str, *, param: str, kind: ErrorKind = ErrorKind.INVALID_ARGUMENT, host: str = ""
    ) -> None:
        super().__init__(kind, message, param=param)
        self.reason = reason
        self.host = host


def no_usable_address(reason: Reason, param: str, host: str) -> FetchError:
    """One text for an unknown name and for a private address."""
    return FetchError(reason, f"the host of '{param}' has no public address", param=param, host=host)


class FetchTooLarge(FetchError):
    """More bytes than one image, or one request, may have."""

    code = "image_too_large"

    def __init__(self, message: str, *, param: str, host: str) -> None:
        super().__init__(Reason.TOO_LARGE, message, param=param, kind=ErrorKind.IMAGE_TOO_LARGE, host=host)


class FetchBusy(FetchError):
    """Too many fetches under way."""

    code = "overloaded"

    def __init__(self, param: str) -> None:
        super().__init__(
            Reason.BUSY, "too many URLs are being fetched, try again", param=param, kind=ErrorKind.OVERLOADED
        )
