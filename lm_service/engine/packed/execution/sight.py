"""Who sees whom where that is more or less than all tokens before: windows, and tokens that see one another.

Tokens are counted from the first one of a sequence: whatever its positions are, a window counts tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

_ROWS = 256  # that are looked at together: more would look at more keys in vain
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """Tokens [begin, end) of a span, and which of the keys [first, last) of its sequence each of them sees."""

    begin: int
    end: int
    first: int
    last: int
    mask: torch.Tensor  # bool [end - begin, last - first]


@dataclass(frozen=True)
class Sight:
    """What the tokens of a span see."""

    rows: list[Rows]

    def to(self, device: torch.device) -> Sight:
        """The same with its masks on another device."""
        return Sight([replace(rows, mask=rows.mask.to(device)) for rows in self.rows])

    def attend(
        self, q: torch.Tensor, seen: Sequence[tuple[torch.Tensor, torch.Tensor]], softcap: float | None
    ) -> torch.Tensor:
        """Output [K, G, n, d] over keys and values [K, L, d], which are parts of a sequence, first to last."""
        first = min(rows.first for rows in self.rows)
        keys, values = (torch.cat(list(_from(first, side)), 1).unsqueeze(1) for side in zip(*seen, strict=True))
        out = torch.empty_like(q)
        for rows in self.rows:
            at = slice(rows.first - first, rows.last - first)
            out[:, :, rows.begin : rows.end] = _attention(
                q[:, :, rows.begin : rows.end], keys[:, :, at], values[:, :, at], rows.mask, softcap
            )
        return out


def _from(first: int, parts: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    for part in parts:
        yield part[:, min(first, part.shape[1]) :]
        first = max(0, first - part.shape[1])


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, softcap: float | None
) -> torch.Tensor:
    k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
    if softcap is None:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = capped(torch.matmul(q.float(), k.float().transpose(-1, -2)) * q.shape[-1] ** -0.5, softcap)
    return torch.matmul(scores.masked_fill_(~mask, -torch.inf).softmax(-1).to(q.dtype), v)


def capped(scores: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Scores, held to between -softcap and softcap."""
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)


def sight_of(
    start: int,
    count: int,
    blocks: Iterable[tuple[int, int]],
    window: int | None,
    *,
    within_window: bool,
    device: torch.device,
) -> Sight | None:
    """Of the tokens [start, start + count) of a sequence, of which those of a block see one another; `within_window`
    is as in `AttentionRules`. None: each sees itself and all before it."""
    places = np.arange(start, start + count)
    until = places + 1  # the first that each doesn't see
    block_starts = places.copy()
    for first, last in blocks:
        inside = slice(max(0, first - start), max(0, last - start))
        until[inside] = np.maximum(until[inside], last)
        block_starts[inside] = first
    since = np.zeros_like(places) if window is None else np.maximum(0, places + 1 - window)
    if not within_window:
        since = np.minimum(since, block_starts)
    if not since.any() and (until == places + 1).all():
        return None
    return Sight([_rows(begin, min(begin + _ROWS, count), since, until, device) for begin in range(0, count, _ROWS)])


def _rows(begin: int, end: int, since: Ints, until: Ints, device: torch.device) -> Rows:
    first, last = int(since[begin:end].min()), int(until[begin:end].max())
    keys = np.arange(first, last)
    mask = (keys >= since[begin:end, None]) & (keys < until[begin:end, None])
    return Rows(begin, end, first, last, torch.from_numpy(mask).to(device))
