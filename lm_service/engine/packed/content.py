"""What tells one KV prefix from another: tokens, their positions and, for image tokens, the embedding's whole key.

A prompt's content is int64 [8, T]: row 0 the token id (minus one less the row number within its image for image
tokens), rows 1 to 3 the positions, rows 4 to 7 the 256 bits of the embedding key. Nothing is hashed or cut short.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lm_service.engine.types import ImageSpan, Prompt

Content = npt.NDArray[np.int64]


def prompt_content(prompt: Prompt) -> Content:
    """The content of a prompt."""
    content = np.zeros((8, len(prompt.token_ids)), dtype=np.int64)
    content[1:4] = prompt.positions.numpy()
    text = 0
    for span in prompt.images:
        content[0, text : span.start] = prompt.token_ids[text : span.start]
        text = span.end
        content[0, span.start : span.end] = -1 - np.arange(span.reference.tokens)
        content[4:8, span.start : span.end] = np.frombuffer(span.reference.key, dtype="<i8")[:, None]
    content[0, text:] = prompt.token_ids[text:]
    return content


def text_content(token_ids: Sequence[int], first_position: int) -> Content:
    """The content of text whose positions count up from `first_position` on all three rows."""
    content = np.zeros((8, len(token_ids)), dtype=np.int64)
    content[0] = token_ids
    content[1:4] = np.arange(first_position, first_position + len(token_ids))
    return content


def common_length(one: Content, other: Content) -> int:
    """How many leading columns are equal."""
    length = min(one.shape[1], other.shape[1])
    differs = (one[:, :length] != other[:, :length]).any(axis=0)
    return int(differs.argmax()) if differs.any() else length


def spans_within(images: Sequence[ImageSpan], start: int, end: int) -> tuple[ImageSpan, ...]:
    """The image spans that lie in [start, end), counted from `start`."""
    inside = (span for span in images if span.start >= start and span.end <= end)
    return tuple(ImageSpan(span.start - start, span.reference) for span in inside)
