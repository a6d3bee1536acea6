"""Recurrent state of sequences and of prefixes, and the memory of that of running sequences.

A step writes beside what it reads, so that one that fails has changed nothing.
"""

from __future__ import annotations

import torch

from lookonce.core.errors import invalid
from lookonce.models.text_adapter import ModelShape

COPIES = 2
"""Of a state that steps go on from: what they read, and what they write."""


class RecurrentState:
    """That of all recurrent layers after some tokens: a tensor for each of `ModelShape.states`."""

    def __init__(self, shape: ModelShape, *, growing: bool = True) -> None:
        """Not yet written; `growing`: steps will go on from it."""
        self.now = _empty(shape)
        self.following = _empty(shape) if growing else []

    def commit(self) -> None:
        """What was written last counts."""
        self.now, self.following = self.following, self.now

    def settle(self) -> None:
        """No step goes on from it any more: it may be read by others."""
        self.following = []

    def copy_(self, other: RecurrentState) -> None:
        """Take over the numbers of another."""
        for mine, theirs in zip(self.now, other.now, strict=True):
            mine.copy_(theirs)

    def wipe(self) -> None:
        """Make all numbers zero."""
        for tensor in (*self.now, *self.following):
            tensor.zero_()

    def is_finite(self) -> bool:
        """Whether all numbers are finite."""
        return all(bool(tensor.isfinite().all()) for tensor in self.now)


class StatePool:
    """States of running sequences: never more than `limit`, and none where the model has no recurrent layers."""

    def __init__(self, shape: ModelShape, budget: int, most: int) -> None:
        """As many as `budget` bytes hold, no more than `most`. Raises INVALID_ARGUMENT where that is none."""
        self._shape = shape
        self._each = COPIES * shape.state_bytes
        self.limit = min(most, budget // self._each) if self._each else 0
        if self._each and not self.limit:
            raise invalid(
                f"kv_bytes is {2 * budget}, of which recurrent states take half; this model has {self._each} bytes of "
                f"them for a sequence: give at least {2 * self._each}",
                param="kv_bytes",
            )
        self.bytes = self.limit * self._each
        """Of all states there may be at a time."""
        self._free: list[RecurrentState] = []
        self.used = 0

    def allocate(self) -> RecurrentState | None:
        """A state, not yet written; None when there is no room."""
        if self.used >= self.limit:
            return None
        self.used += 1
        return self._free.pop() if self._free else RecurrentState(self._shape)

    def free(self, state: RecurrentState) -> None:
        """Give a state back: nothing of its sequence is left in it."""
        state.wipe()
        self._free.append(state)
        self.used -= 1


def _empty(shape: ModelShape) -> list[torch.Tensor]:
    return [torch.empty(state.shape, dtype=state.dtype, device=shape.device) for state in shape.states]
