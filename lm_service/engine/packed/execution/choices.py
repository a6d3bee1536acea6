"""Choices as a trie: tokens that several choices begin with are computed once.

Only tokens that are followed by another need a place in the forward; a choice's last token is only looked up.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

_REMEMBERED, _REMEMBERED_TOKENS = 256, 64  # tries that are kept, and the most tokens of one


class ChoiceTrie:
    """Places 0 .. n-1 follow the prompt in a packed forward, parents before children."""

    def __init__(self, choices: tuple[tuple[int, ...], ...]) -> None:
        self.tokens: list[int] = []  # token of each place
        self.parents: list[int] = []  # place before it; -1: the prompt's last token
        self._targets: list[dict[int, list[int]]] = [{}]  # [1 + place] -> next token -> choices that add it
        places: dict[tuple[int, ...], int] = {(): -1}
        for number, choice in enumerate(choices):
            for end in range(len(choice)):
                prefix = tuple(choice[:end])
                if prefix not in places:
                    places[prefix] = len(self.tokens)
                    self.tokens.append(prefix[-1])
                    self.parents.append(places[prefix[:-1]])
                    self._targets.append({})
                self._targets[1 + places[prefix]].setdefault(choice[end], []).append(number)
        depths = [0] * len(self.tokens)
        for place, parent in enumerate(self.parents):
            depths[place] = 0 if parent < 0 else depths[parent] + 1
        self.depths = np.array(depths, dtype=np.int64)
        self.visible = self._visible()
        self.visible.setflags(write=False)

    def ancestors(self, place: int) -> list[int]:
        """The places a place may see, itself included."""
        seen = []
        while place >= 0:
            seen.append(place)
            place = self.parents[place]
        return seen

    def _visible(self) -> npt.NDArray[np.bool_]:
        """[n, n]: whether each place (row) sees each other."""
        seen = np.zeros((len(self.tokens), len(self.tokens)), dtype=np.bool_)
        for place in range(len(self.tokens)):
            seen[place, self.ancestors(place)] = True
        return seen

    def targets(self, place: int) -> Collection[int]:
        """Tokens whose log-probability is wanted after a place (-1: after the prompt)."""
        return self._targets[1 + place].keys()

    def add(self, sums: list[float], place: int, logprobs: Sequence[float]) -> None:
        """Add the log-probabilities of `targets(place)`, in that order, to the sums of the choices."""
        for numbers, logprob in zip(self._targets[1 + place].values(), logprobs, strict=True):
            for number in numbers:
                sums[number] += logprob


def trie_of(choices: tuple[tuple[int, ...], ...]) -> ChoiceTrie:
    """Their trie, most often one made before: many questions have the same choices."""
    return _remembered(choices) if sum(map(len, choices)) <= _REMEMBERED_TOKENS else ChoiceTrie(choices)


_remembered = lru_cache(maxsize=_REMEMBERED)(ChoiceTrie)


def gather_logprobs(logits: torch.Tensor, wanted: Sequence[Collection[int]]) -> list[list[float]]:
    """Log-probabilities of the wanted tokens of each row of logits [rows, vocabulary]."""
    rows = [row for row, tokens in enumerate(wanted) for _ in tokens]
    columns = [token for tokens in wanted for token in tokens]
    at, tokens = torch.tensor([rows, columns], device=logits.device)
    values = iter(logits.float().log_softmax(-1)[at, tokens].tolist())
    return [[next(values) for _ in tokens] for tokens in wanted]
