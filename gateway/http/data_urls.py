"""Pictures inside a request: data: URLs and base64, bounded before they are decoded, decoded strictly."""

from __future__ import annotations

import binascii
from collections.abc import Iterable, Iterator

from gateway.http.off_loop import aside
from gateway.json_text import LONG_STRINGS, PIECE
from gateway.schemas.chat_bodies import REFERENCE
from lookonce.core.errors import ErrorKind, LookonceError, invalid
from lookonce.core.units import format_size


def image_reference(url: str) -> str | None:
    """The image id in "lookonce:ID", or None for another kind of URL."""
    return url.removeprefix(REFERENCE) if url.startswith(REFERENCE) else None


def base64_of(url: str, param: str) -> str:
    """The base64 of a data: URL. Raises INVALID_ARGUMENT for a malformed one, UNSUPPORTED for another scheme."""
    if not url[:5].lower() == "data:":
        raise LookonceError(
            ErrorKind.UNSUPPORTED,
            f"'{param}' must be an https:, http: or data: URL, or {REFERENCE}IMAGE_ID",
            param=param,
        )
    header, comma, payload = url.partition(",")
    if not comma or len(header) > 256 or not header.lower().endswith(";base64"):
        raise invalid(f"'{param}' must be of the form data:image/...;base64,...", param=param)
    return payload


def decoded_size(payload: str) -> int:
    """Bytes that base64 text decodes to, from its length alone."""
    string = LONG_STRINGS.get().get(payload)
    if string is not None:
        return string.chars * 3 // 4 - string.raw[string.end - 2 : string.end].count(b"=")
    return len(payload) * 3 // 4 - payload[-2:].count("=")


def check_size(size: int, limit: int, param: str) -> None:
    """Raise IMAGE_TOO_LARGE for a file over the limit, INVALID_ARGUMENT for an empty one."""
    if size > limit:
        raise LookonceError(
            ErrorKind.IMAGE_TOO_LARGE,
            f"'{param}' is an image of {format_size(size)}, the limit is {format_size(limit)}",
            param=param,
        )
    if size <= 0:
        raise invalid(f"'{param}' is empty", param=param)


async def decode(payload: str, param: str) -> bytes:
    """Strict base64 (RFC 4648 alphabet, padded, nothing else). Raises INVALID_ARGUMENT."""
    string = LONG_STRINGS.get().get(payload)
    try:
        if string is not None:
            return await aside(string.chars, _decode, string.pieces())
        return await aside(len(payload), _decode, _encoded(payload))
    except (binascii.Error, UnicodeEncodeError) as error:
        raise invalid(f"'{param}' is not valid base64", param=param) from error


def _encoded(text: str) -> Iterator[bytes]:
    return (text[start : start + PIECE].encode("ascii") for start in range(0, len(text), PIECE))


def _decode(pieces: Iterable[bytes]) -> bytes:
    """Piece by piece, so that other threads have their turn. Only the last four characters may be padded."""
    decoded: list[bytes] = []
    left = b""
    for piece in pieces:
        text = left + piece
        whole = max(0, len(text) - 1) // 4 * 4
        if b"=" in text[:whole]:
            raise binascii.Error("padding within")
        decoded.append(binascii.a2b_base64(text[:whole], strict_mode=True))
        left = text[whole:]
    decoded.append(binascii.a2b_base64(left, strict_mode=True))
    return b"".join(decoded)
