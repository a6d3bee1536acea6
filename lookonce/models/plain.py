"""What a half's weights compute, written as plainly as the model's paper: what the services' own forwards are held to.

Weights are those that a loader has just read, before anything is made of them, or are read from the checkpoint's files.
Some rows at a time, rounded to the compute dtype, are widened to float32 and dropped again: beside a loaded half there
is never more than one matrix, where that is not stored plain, and else a part of one. Nothing here is packed, compiled,
cached or quantised. Each family that has such a form answers `Family.plain` with it. Imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch.nn import functional

from lookonce.models.checkpoint.headers import TensorEntry
from lookonce.models.checkpoint.weights import read_weight
from lookonce.models.family import EMBEDDING, HEAD, Half

if TYPE_CHECKING:
    from PIL import Image

    from lookonce.models.checkpoint.checkpoint import Checkpoint

_AT_HAND = 1 << 19
"""Numbers of a matrix at once, about: memory of 2 MiB is used again, where new memory costs a fault for each page."""


@dataclass(frozen=True)
class PlainPrompt:
    """Tokens, some of which are an image's."""

    token_ids: tuple[int, ...]
    start: int  # where the image's tokens begin
    rows: torch.Tensor  # [1 + deepstack, tokens, hidden], float32
    positions: torch.Tensor  # int64 [r, T]
    last: int  # how many of the last tokens' logits are wanted


class Plain(Protocol):
    """A family's plain form, over one checkpoint. Each call reads the half that it needs."""

    def rows(self, image: Image.Image) -> torch.Tensor:
        """Float32 [tokens, hidden] of an RGB image that need not be resized, or [1 + deepstack, tokens, hidden]."""

    def logits(self, prompts: Sequence[PlainPrompt]) -> list[torch.Tensor]:
        """Float32 [last, vocabulary] of each prompt."""


class PlainVectors(Plain, Protocol):
    """That of a family some of whose checkpoints make vectors."""

    def rows_for_head(self, prompts: Sequence[PlainPrompt]) -> list[torch.Tensor]:
        """Float32 [last, width] of each prompt: what vectors are made of, or what an output head would be given."""


class Weights:
    """A half's weights by name, float32 on the CPU."""

    def __init__(self, checkpoint: Checkpoint, half: Half, dtype: torch.dtype) -> None:
        """`dtype`: what they are rounded to first. Those that the checkpoint has in memory are."""
        self._checkpoint, self._half, self._dtype = checkpoint, half, dtype
        self._entries = checkpoint.half_entries(half)

    def __call__(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """All of it, or some rows."""
        if self._checkpoint.held is not None:
            held: torch.Tensor = self._checkpoint.held[name]
            return (held if rows is None else held[slice(*rows)]).detach().to("cpu", torch.float32)
        return read_weight(self._checkpoint, self._half, name, self._dtype, rows).float()

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """x W^T + b, b where there is one."""
        product = self._product(f"{name}.weight", x)
        return product + self(f"{name}.bias") if f"{name}.bias" in self._entries else product

    def _product(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] and a matrix [out, ...] -> x W^T [T, out]."""
        return torch.cat([functional.linear(x, rows.flatten(1)) for rows in self._parts(name)], dim=-1)

    def _parts(self, name: str) -> Iterator[torch.Tensor]:
        """A matrix some rows at a time, as a whole where its rows are made together."""
        entry, adapter = self._entries[name], self._checkpoint.adapter
        total = step = entry.shape[0]
        if isinstance(entry, TensorEntry) and (adapter is None or name not in adapter.added[self._half]):
            step = max(1, _AT_HAND // math.prod(entry.shape[1:]))
        for start in range(0, total, step):
            yield self(name, (start, min(start + step, total)))

    def embedded(self, prompt: PlainPrompt) -> torch.Tensor:
        """[T, hidden] of a prompt."""
        hidden = torch.cat([self(EMBEDDING, (number, number + 1)) for number in prompt.token_ids])
        rows = prompt.rows[0].to(self._dtype).float()
        hidden[prompt.start : prompt.start + len(rows)] = rows
        return hidden

    def vocabulary_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, vocabulary] by the output head, or by the embedding where that is the head too."""
        return self._product(HEAD if HEAD in self._entries else EMBEDDING, hidden)


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
    """Attention of q [T, heads, d] over k and v [T, kv_heads, d], where `seen` [T, T] allows -> [T, heads * d]."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1)


def rotated(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [T, heads, d] by angles [T, d / 2]: the halves of d are the coordinates."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rms_normed(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """RMSNorm of [T, n]."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight
