"""What tells one KV prefix from another: tokens, their positions, for image tokens the embedding's whole key, and for
text the salt of its request: prompts of different salts never meet, however alike their text is.

Content is int64 [5 + r, T]: row 0 the token id (for an image's tokens minus one less the place within it), rows 1 to 4
the 256 bits of the embedding key, or of the salt, then r rows of positions. Nothing is hashed or cut short, but where
a prompt's KV is that of no other: rows 1 to 4 are then a digest of all of it.

A prompt's is made of two parts: what many prompts of one request begin with alike, up to the end of the last image, is
made, and found in the cache, once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from lm_service.engine.types import ImageSpan, Prompt

Content = npt.NDArray[np.int64]
POSITIONS = 5
"""The first row of positions."""


@dataclass(eq=False)
class Head:
    """What prompts begin with, up to the end of their last image."""

    columns: Content

    @property
    def length(self) -> int:
        """Its tokens."""
        return int(self.columns.shape[1])


@dataclass(eq=False)
class PromptContent:
    """The content of a prompt, and of what was added to it."""

    head: Head
    rest: Content

    @property
    def length(self) -> int:
        """Its tokens."""
        return self.head.length + int(self.rest.shape[1])

    def cut(self, start: int, end: int) -> Content:
        """That of the tokens [start, end), not to be written to."""
        border = self.head.length
        if start >= border:
            return self.rest[:, start - border : end - border]
        if end <= border:
            return self.head.columns[:, start:end]
        return np.concatenate([self.head.columns[:, start:], self.rest[:, : end - border]], axis=1)

    def followed_by(self, more: Content) -> PromptContent:
        """The same and more."""
        return PromptContent(self.head, np.concatenate([self.rest, more], axis=1))


def prompt_contents(prompts: Iterable[Prompt], salt: bytes = b"", *, prefix_reuse: bool = True) -> list[PromptContent]:
    """The contents of prompts, their text salted with 32 bytes, or none; neighbours that begin alike share their
    head. Without `prefix_reuse` a prompt has none, and what is before its last token is found by the same prompt
    only."""
    if not prefix_reuse:
        return [_whole_content(prompt, salt) for prompt in prompts]
    contents: list[PromptContent] = []
    before: Prompt | None = None
    for prompt in prompts:
        end = prompt.images[-1].end if prompt.images else 0
        alike = before is not None and _begin_alike(before, prompt, end)
        head = contents[-1].head if alike else Head(_columns(prompt, 0, end, salt))
        contents.append(PromptContent(head, _columns(prompt, end, len(prompt.token_ids), salt)))
        before = prompt
    return contents


def _whole_content(prompt: Prompt, salt: bytes) -> PromptContent:
    columns = _columns(prompt, 0, len(prompt.token_ids), salt)
    columns[1:POSITIONS] = _words(blake3(columns.tobytes()).digest())
    return PromptContent(Head(columns[:, :0]), columns)


def _begin_alike(one: Prompt, other: Prompt, end: int) -> bool:
    """Whether two prompts are the same up to the end of their last image."""
    if one.images != other.images:
        return False
    if one.positions is not other.positions:
        differs = one.positions[:, :end] != other.positions[:, :end]
        if differs.any():
            return False
    starts = (0, *(span.end for span in one.images))
    return all(
        one.token_ids[start : span.start] == other.token_ids[start : span.start]
        for start, span in zip(starts, one.images, strict=False)
    )


def _columns(prompt: Prompt, start: int, end: int, salt: bytes) -> Content:
    """Those of [start, end), which cuts no image in two."""
    content = _salted(end - start, len(prompt.positions), salt)
    content[POSITIONS:] = prompt.positions[:, start:end]
    text = start
    for span in prompt.images:
        if not start <= span.start < end:
            continue
        first, last = span.start - start, span.end - start
        content[0, text - start : first] = prompt.token_ids[text : span.start]
        content[0, first:last] = -1 - span.first - np.arange(last - first)
        content[1:POSITIONS, first:last] = _words(span.reference.key)
        text = span.end
    content[0, text - start :] = prompt.token_ids[text:end]
    return content


def _salted(length: int, position_rows: int, salt: bytes) -> Content:
    content = np.zeros((POSITIONS + position_rows, length), dtype=np.int64)
    if salt:
        content[1:POSITIONS] = _words(salt)
    return content


def _words(value: bytes) -> npt.NDArray[np.int64]:
    """32 bytes as a column [4, 1]."""
    return np.frombuffer(value, dtype="<i8")[:, None]


def text_content(token_ids: Sequence[int], first_position: int, position_rows: int, salt: bytes = b"") -> Content:
    """The content of text whose positions count up from `first_position` on all rows."""
    content = _salted(len(token_ids), position_rows, salt)
    content[0] = token_ids
    content[POSITIONS:] = np.arange(first_position, first_position + len(token_ids))
    return content


def common_length(one: Content, other: Content) -> int:
    """How many leading columns are equal."""
    length = min(one.shape[1], other.shape[1])
    differs = (one[:, :length] != other[:, :length]).any(axis=0)
    return int(differs.argmax()) if differs.any() else length


def spans_within(images: Sequence[ImageSpan], start: int, end: int) -> tuple[ImageSpan, ...]:
    """The image spans that lie in [start, end), counted from `start`."""
    inside = (span for span in images if span.start >= start and span.end <= end)
    return tuple(replace(span, start=span.start - start) for span in inside)
