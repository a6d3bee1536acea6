"""Calls of functions within an answer's text, found while the text comes: in the form that the language service holds
them to (`Tools` in language.proto)."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field

import orjson

BEGIN, END = "<tool_call>", "}\n</tool_call>"
_HEAD = re.compile(r'\s*\{"name": ("(?:[^"\\]|\\.)*"), "arguments": ')


@dataclass
class Call:
    """A call, and its arguments so far."""

    number: int
    name: str
    arguments: str = ""
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    def as_json(self) -> dict[str, object]:
        """OpenAI's object."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True)
class Piece:
    """What came: text of the answer, or arguments of a call, which `begins` with them."""

    text: str
    call: Call | None = None
    begins: bool = False


class ToolCallReader:
    """Reads one answer."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._held = ""  # may yet be part of a tag
        self._within = False
        self._call: Call | None = None

    def push(self, text: str, *, last: bool = False) -> list[Piece]:
        """The pieces that this text completes; with the `last` one nothing is held back."""
        self._held += text
        found = [piece for piece in self._pieces() if piece.text or piece.begins]
        if last:
            found += self._rest()
        return found

    def _pieces(self) -> Iterator[Piece]:
        while True:
            if not self._within:
                before, tag, after = self._held.partition(BEGIN)
                if not tag:
                    cut = len(before) - _overlap(before, BEGIN)
                    yield Piece(before[:cut] if before[:cut].strip() or not self.calls else "")
                    self._held = before[cut:]
                    return
                yield Piece(before if before.strip() else "")
                self._within, self._held = True, after
            if self._call is None:
                head = _HEAD.match(self._held)
                if head is None:
                    return
                self._call = Call(len(self.calls), orjson.loads(head[1]))
                self.calls.append(self._call)
                self._held = self._held[head.end() :]
                yield Piece("", self._call, begins=True)
            said, end, after = self._held.partition(END)
            cut = len(said) if end else len(said) - _overlap(said, END)
            self._call.arguments += said[:cut]
            yield Piece(said[:cut], self._call)
            if not end:
                self._held = said[cut:]
                return
            self._held, self._within, self._call = after, False, None

    def _rest(self) -> Iterator[Piece]:
        held, self._held = self._held, ""
        if not held:
            return
        if self._call is not None:
            self._call.arguments += held
            yield Piece(held, self._call)
        elif not self._within:
            yield Piece(held)


def read_calls(text: str) -> tuple[str, list[Call]]:
    """A whole answer: its text without calls, and these."""
    reader = ToolCallReader()
    said = "".join(piece.text for piece in reader.push(text, last=True) if piece.call is None)
    return said, reader.calls


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` that begins `tag`."""
    longest = min(len(text), len(tag) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(tag[:size])), 0)
