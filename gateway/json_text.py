"""Reading JSON that anybody may have written: its shape is bounded before values are made of it, so that reading costs
at most what the limits allow; images in it stay bytes until they are decoded.

A single call into C keeps every other thread waiting. So long base64 is left where it lies, and a short name stands in
its place; what remains is small enough to be parsed at once."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import orjson
from blake3 import blake3

from lookonce.core.errors import LookonceError, invalid

LONG = 1 << 16
"""Bytes from which a string is left where it lies."""
CHUNK = 1 << 20
"""Bytes that are looked at in one call."""
IMAGE_FIELDS = frozenset({"url", "data", "data_base64", "image", "image_url", "images"})
"""Fields that may hold an image; strings in all others are texts."""
_GAP = 4096  # bytes between two marks that are looked at in one call
_NAME = secrets.token_hex(16)  # begins the names of long strings: no client can know it
_NAME_CHARS = 64
_MARK = re.compile(rb'["{}\[\],]')
_DATA_URL = re.compile(rb'data:(?:[^,"\\]|\\/){0,200};base64,', re.IGNORECASE)
_BACKSLASH = ord("\\")
_LONGEST = 12  # bytes of a character: a pair of escapes
_HIGH = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}")
_COLON = re.compile(rb'"[ \t\r\n]{0,256}:')


@dataclass(frozen=True)
class JsonLimits:
    """What a JSON text may hold."""

    depth: int = 32  # lists and objects within each other
    items: int = 100_000  # values in all lists and objects together
    keys: int = 256  # fields of one object
    number_chars: int = 64  # of one number
    text_chars: int = 1_000_000  # of one text that is no image

    @property
    def text_bytes(self) -> int:
        """Bytes of everything but images."""
        return 4 * self.text_chars + (1 << 20)


@dataclass(frozen=True)
class LongString:
    """A long string within a JSON text."""

    raw: bytes | bytearray = field(repr=False)
    start: int
    end: int
    escapes: int | None  # how many "\\/" are in it; None: it has other escapes, or more than ASCII

    @property
    def chars(self) -> int:
        """Its length as a string, of plain ones."""
        return self.end - self.start - (self.escapes or 0)

    def chunks(self) -> Iterator[bytes]:
        """Its bytes, at most CHUNK at a time."""
        return (chunk.replace(b"\\/", b"/") for chunk in _chunks(self.raw, self.start, self.end))

    def text(self) -> str:
        """The string itself. Raises orjson.JSONDecodeError."""
        parts, start = [], self.start
        while start < self.end:
            stop = _between_characters(self.raw, start, min(start + LONG, self.end), self.end)
            parts.append(orjson.loads(b'"%b"' % bytes(self.raw[start:stop])))
            start = stop
        return "".join(parts)


LONG_STRINGS: ContextVar[Mapping[str, LongString]] = ContextVar("LONG_STRINGS", default=MappingProxyType({}))
"""Those of the request that is answered, by the names that stand in their places."""


@dataclass(frozen=True)
class Parsed:
    """A value, and the long strings that names in it stand for."""

    value: Any
    long: Mapping[str, LongString]


def parse_json(raw: bytes | bytearray, limits: JsonLimits, what: str = "the request body") -> Parsed:
    """The value of a JSON text, called `what` in errors. Raises INVALID_ARGUMENT for what exceeds the limits and for
    what is no JSON."""
    scan = _Scan(raw, limits, what)
    rest = scan.rest()
    try:
        value = orjson.loads(rest)
        return Parsed(_with_texts(value, "", scan.long, limits) if scan.long else value, scan.long)
    except orjson.JSONDecodeError as error:
        where = "" if scan.long else f" (line {error.lineno}, column {error.colno})"
        raise invalid(f"{what} is not valid JSON{where}") from error


class _Scan:
    """Walks over the marks of a JSON text and counts. It knows nothing of grammar: what passes is still parsed."""

    def __init__(self, raw: bytes | bytearray, limits: JsonLimits, what: str) -> None:
        self.long: dict[str, LongString] = {}
        self._raw = raw
        self._limits = limits
        self._what = what
        self._open: list[int] = []  # values so far in each open list (< 0: not counted) or object
        self._items = 0
        self._escaped = 0
        self._kept: list[bytes | bytearray] = []
        self._copied = 0
        self._left_out = 0  # bytes

    def rest(self) -> bytes | bytearray:
        """The text with names in the places of long strings. Raises INVALID_ARGUMENT."""
        position = 0
        while position < len(self._raw):
            found = _MARK.search(self._raw, position, position + _GAP)
            end = found.start() if found else min(position + _GAP, len(self._raw))
            if end - position > self._limits.number_chars:
                self._check_number(position, end)
            position = self._mark(end) if found else end
            if position - self._left_out > self._limits.text_bytes:
                raise self._exceeds(f"{self._limits.text_bytes} bytes beside images and long texts", "--max-text-chars")
        if not self.long:
            return self._raw
        self._kept.append(self._raw[self._copied :])
        return b"".join(self._kept)

    def _mark(self, at: int) -> int:
        """Count what begins or ends at a mark; where to go on."""
        mark = self._raw[at : at + 1]
        if mark == b'"':
            return self._string(at + 1)
        if mark in (b"{", b"["):
            self._count()
            self._open.append(1 if mark == b"{" else -self._limits.items)
            if len(self._open) > self._limits.depth:
                raise self._exceeds(f"{self._limits.depth} lists and objects within each other", "--max-json-depth")
        elif mark == b",":
            self._count()
            if self._open:
                self._open[-1] += 1
                if self._open[-1] > self._limits.keys:
                    raise self._exceeds(f"{self._limits.keys} fields in one object", "--max-json-keys")
        elif self._open:
            self._open.pop()
        return at + 1

    def _count(self) -> None:
        self._items += 1
        if self._items > self._limits.items:
            raise self._exceeds(f"{self._limits.items} values", "--max-json-items")

    def _check_number(self, start: int, end: int) -> None:
        if len(self._raw[start:end].strip()) > self._limits.number_chars:
            raise self._exceeds(f"{self._limits.number_chars} characters in a number", "--max-json-number")

    def _string(self, start: int) -> int:
        end = self._closing(start)
        if end - start > LONG:
            self._leave_out(start, end, _escapes(self._raw, start, end))
        return end + 1

    def _closing(self, start: int) -> int:
        """Where the quote is that ends a string."""
        end = self._raw.find(b'"', start)
        while end >= 0 and _backslashes(self._raw, start, end) % 2:
            self._escaped += 1
            if self._escaped > self._limits.text_chars:
                raise self._exceeds(f"{self._limits.text_chars} quotes in texts", "--max-text-chars")
            end = self._raw.find(b'"', end + 1)
        return end if end >= 0 else len(self._raw)

    def _exceeds(self, most: str, setting: str) -> LookonceError:
        return invalid(f"{self._what} has more than {most} (the gateway's {setting})")

    def _leave_out(self, start: int, end: int, escapes: int | None) -> None:
        if _COLON.match(self._raw, end):
            raise invalid(f"a field's name in {self._what} is too long")
        header = _DATA_URL.match(self._raw, start, end)
        if header is not None:
            start = header.end()
        string = LongString(self._raw, start, end, escapes)
        digest = blake3()
        for chunk in string.chunks():
            digest.update(chunk)
        name = _NAME + digest.hexdigest()[: _NAME_CHARS - len(_NAME)]
        self.long[name] = string
        self._kept += (self._raw[self._copied : start], name.encode())
        self._copied = end
        self._left_out += end - start


def _with_texts(value: Any, key: str, long: Mapping[str, LongString], limits: JsonLimits) -> Any:
    """The value with its texts in their places; names are left only where images may be."""
    if isinstance(value, dict):
        return {name: _with_texts(item, name, long, limits) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_texts(item, key, long, limits) for item in value]
    string = long.get(value[-_NAME_CHARS:]) if isinstance(value, str) else None
    if string is None or key in IMAGE_FIELDS:
        return value
    # A character takes 12 bytes at most: two escapes of four digits.
    text = string.text() if string.end - string.start <= 12 * limits.text_chars else None
    if text is None or len(text) > limits.text_chars:
        text = f"'{key}' has more than {limits.text_chars} characters (the gateway's --max-text-chars)"
        raise invalid(text, param=key or None)
    return value[:-_NAME_CHARS] + text


def _chunks(raw: bytes | bytearray, start: int, end: int) -> Iterator[bytes]:
    """Chunks that tear no escape apart."""
    while start < end:
        stop = min(start + CHUNK, end)
        if stop < end and raw[stop - 1 : stop] == b"\\":
            stop += 1
        yield bytes(raw[start:stop])
        start = stop


def _escapes(raw: bytes | bytearray, start: int, end: int) -> int | None:
    """How many slashes are escaped; None for a string with other escapes or beyond ASCII."""
    escapes = 0
    for chunk in _chunks(raw, start, end):
        found = chunk.count(b"\\")
        if not chunk.isascii() or found != chunk.count(b"\\/"):
            return None
        escapes += found
    return escapes


def _between_characters(raw: bytes | bytearray, start: int, stop: int, end: int) -> int:
    """The last place up to `stop` that is in no escape, pair of escapes, or character of several bytes."""
    if stop == end:
        return end
    escape = raw.rfind(b"\\", stop - _LONGEST, stop)
    if escape < 0:
        while 0x80 <= raw[stop] < 0xC0:
            stop -= 1
        return stop
    if _backslashes(raw, start, escape) % 2:
        escape -= 1
    return escape - 6 if _HIGH.fullmatch(raw, escape - 6, escape) else escape


def _backslashes(raw: bytes | bytearray, start: int, end: int) -> int:
    """How many stand right before `end`."""
    if end == start or raw[end - 1] != _BACKSLASH:
        return 0
    if end - 1 == start or raw[end - 2] != _BACKSLASH:
        return 1
    window = 64
    while True:
        tail = raw[max(start, end - window) : end]
        count = len(tail) - len(tail.rstrip(b"\\"))
        if count < window:
            return count
        window *= 8
