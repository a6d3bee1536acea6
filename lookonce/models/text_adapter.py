"""What the packed engine asks of a model: token rows in, keys and values handed to an attention function, logits out.

Layers that keep a state instead, such as short convolutions or gated delta rules, hand it to a `Recur`. Another family
is another adapter. The engine never sees modules; an adapter never sees sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any, Protocol

import numpy.typing as npt
import torch


@dataclass(frozen=True)
class Stage:
    """Consecutive layers on one device."""

    device: torch.device
    layers: int


class BothWays(StrEnum):
    """Which tokens of a prompt see those behind them, too."""

    IMAGES = "images"  # neighbouring rows of an image see one another
    PROMPT = "prompt"  # the whole prompt sees itself


@dataclass(frozen=True)
class AttentionRules:
    """What attention does that is more than each token seeing itself and all before it."""

    windows: tuple[int | None, ...]  # of each layer: how many tokens back are seen, itself included; None: all
    both_ways: BothWays | None = None
    within_window: bool = True  # a window also hides what lies before it from tokens that see one another
    softcap: float | None = None  # scores are held to between its negative and it by tanh

    @property
    def prefix_reuse(self) -> bool:
        """Whether the KV of what prompts begin with alike is the same for all of them."""
        return self.both_ways is not BothWays.PROMPT


@dataclass(frozen=True)
class StateTensor:
    """What a recurrent layer keeps of one sequence: as large after one token as after a thousand."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of one."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class ModelShape:
    """The dimensions that decide the size of KV, and of recurrent state."""

    layers: int  # that keep keys and values
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocabulary: int
    context: int  # longest sequence the model was made for
    dtype: torch.dtype
    stages: tuple[Stage, ...]  # where the layers are, in order
    position_rows: int = 1  # r of the positions [r, T]: 3 for M-RoPE
    deepstack: int = 0  # first layers behind which rows are added to an image's tokens
    rules: AttentionRules | None = None  # of attention; None: causal, over everything
    states: tuple[StateTensor, ...] = ()  # of the recurrent layers, in the order in which a step reads them
    attends_last: bool = True  # behind the last attention no layer reads another token's row

    @cached_property
    def prefix_reuse(self) -> bool:
        """Whether the KV of what prompts begin with alike is the same for all of them."""
        return self.rules is None or self.rules.prefix_reuse

    @cached_property
    def device(self) -> torch.device:
        """Where a step begins: that of the embedding and the first layer."""
        return self.stages[0].device

    @cached_property
    def group(self) -> int:
        """Query heads per key-value head."""
        return self.heads // self.kv_heads

    @cached_property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize

    @cached_property
    def state_bytes(self) -> int:
        """Bytes of one sequence's recurrent state."""
        return sum(state.nbytes for state in self.states)


AttentionCalls = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], npt.NDArray[Any]]
"""(q, k, v as for `Attend`, output [T, heads * d]), the same in every layer -> calls of kernels [layers, n]."""


class Attend(Protocol):
    """Attention of one layer over everything each token may see, new keys and values stored on the way."""

    @property
    def calls(self) -> AttentionCalls | None:
        """What computes it within a program of compiled layers; None: it is called layer by layer only."""

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [T, heads, d], k and v [T, kv_heads, d], rotated, each head contiguous -> [T, heads * d]."""


@dataclass(frozen=True)
class Runs:
    """n runs of neighbouring tokens of a step that are computed at once, the longest of L tokens. Each goes on from a
    state of its own."""

    tokens: torch.Tensor  # int64 [n, L]: which token of the step is at each place; behind a run's end its last one
    lengths: torch.Tensor  # int64 [n]
    places: torch.Tensor | None  # int64 [tokens]: those of tokens among n * L; None: all, no run is shorter

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the step's tokens [T, ...] -> [n, L, ...]."""
        return rows.index_select(0, self.tokens.view(-1)).view(*self.tokens.shape, *rows.shape[1:])

    def scatter(self, made: torch.Tensor, rows: torch.Tensor) -> None:
        """Write [n, L, ...] to the rows [T, ...] of its tokens."""
        made, tokens = made.flatten(0, 1), self.tokens.view(-1)
        if self.places is not None:
            made, tokens = made.index_select(0, self.places), tokens.index_select(0, self.places)
        rows.index_copy_(0, tokens, made)


class Recur(Protocol):
    """The states of one step. Each token of the step is in one run. Running a step again begins from the same states:
    what is kept counts when the step has succeeded."""

    @property
    def groups(self) -> Sequence[Runs]:
        """All runs; behind those that they go on from."""

    def before(self, number: int, runs: Runs) -> torch.Tensor:
        """State `number` of the model's shape before each run: [n, ...]. Zeros where a sequence begins."""

    def keep(self, number: int, runs: Runs, states: torch.Tensor) -> None:
        """That after each run, [n, ...]. To be called for one group after the other."""


@dataclass(frozen=True)
class Deepstack:
    """What is added to some neighbouring tokens of a step (DeepStack, arXiv:2406.04334)."""

    first: int  # token of the step
    rows: torch.Tensor  # [layers, tokens, hidden], as many layers as the model's shape says; not to be written to


class ModelAdapter(Protocol):
    """A decoder-only language model over packed tokens."""

    @property
    def shape(self) -> ModelShape:
        """Its dimensions."""

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """int64 [T] -> [T, hidden]."""

    def forward(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        attend: Attend,
        rows: torch.Tensor,
        deepstack: Sequence[Deepstack] = (),
    ) -> torch.Tensor:
        """[T, hidden] at positions int64 [r, T] -> logits [len(rows), vocabulary] of the rows asked for. Row i of
        `deepstack` is added behind layer i; where the shape has none, it is not passed."""


class RecurrentAdapter(ModelAdapter, Protocol):
    """A model whose shape has states."""

    def forward(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        attend: Attend,
        rows: torch.Tensor,
        deepstack: Sequence[Deepstack] = (),
        recur: Recur | None = None,
    ) -> torch.Tensor:
        """The same; None: all tokens are those of one sequence from its beginning on."""
