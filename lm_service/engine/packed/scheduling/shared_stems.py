"""What questions about the same images go on with alike: worth computing once, by the first of them, for all.

Questions of one policy begin with the same words ("Does this image contain ..."). Where such a stretch ends depends on
the questions of the request alone, so that asking them again, beside whatever else, cuts them the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby

Rest = tuple[int, ...]  # token ids behind the last image
_LEVELS = 4  # of stems within stems
_REMEMBERED, _REMEMBERED_TOKENS = 64, 4096  # results that are kept, and the most tokens of one


def stems(rests: Sequence[Rest], worth: int) -> list[tuple[int, ...]]:
    """For each of the rests, at which lengths the stretches end that it shares with others, shortest first.

    A stretch is shared where that spares at least `worth` tokens. The last token of a rest is never part of one: its
    logits are wanted.
    """
    short = sum(map(len, rests)) <= _REMEMBERED_TOKENS
    return list((_remembered if short else _stems)(tuple(rests), worth))


def _stems(rests: tuple[Rest, ...], worth: int) -> tuple[tuple[int, ...], ...]:
    ends: list[list[int]] = [[] for _ in rests]
    shareable = [rest[:-1] for rest in rests]

    def streams(group: Sequence[int], start: int, levels: int) -> int:
        """Of the rests numbered in `group`, sorted and the same before `start`, how many are left to compute apart."""
        if not levels:
            return len(group)
        left = 0
        for token, alike in groupby(group, lambda number: shareable[number][start : start + 1]):
            numbers = list(alike)
            if not token or len(numbers) == 1:
                left += len(numbers)
                continue
            end = _common_length(shareable[numbers[0]], shareable[numbers[-1]])
            inner = streams(numbers, end, levels - 1)
            if (inner - 1) * (end - start) < worth:
                left += inner
                continue
            left += 1
            for number in numbers:
                ends[number].append(end)
        return left

    streams(sorted(range(len(rests)), key=shareable.__getitem__), 0, _LEVELS)
    return tuple(tuple(reversed(own)) for own in ends)


def _common_length(one: Rest, other: Rest) -> int:
    differs = (place for place, (left, right) in enumerate(zip(one, other, strict=False)) if left != right)
    return next(differs, min(len(one), len(other)))


_remembered = lru_cache(maxsize=_REMEMBERED)(_stems)
