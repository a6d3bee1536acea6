"""Recurrent layers in a packed step: transformers' modules project all tokens of a step together, and what goes from
token to token goes run by run, from and to a `Recur`'s states.

The modules call two functions of their modelling module: a causal convolution, and a gated delta rule where they have
one (arXiv:2412.06464). Within `recurring` they are called once for each group of runs, padded to its longest; elsewhere
as they are.
"""

from __future__ import annotations

import functools
import math
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lookonce.models.text_adapter import Attend, AttentionCalls, Recur, Runs, StateTensor

_CONVOLUTION, _CHUNKED, _SINGLE = "causal_conv1d_fn", "torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"
CONVOLVES, DELTA_RULE = "conv", "linear_attention"
"""The kinds of layers, as `layer_types` of a config calls them, whose state is known here."""
STATES = {CONVOLVES: (_CONVOLUTION,), DELTA_RULE: (_CONVOLUTION, _CHUNKED)}
"""What each kind calls, each with a state of its own."""
_step = threading.local()


@dataclass(frozen=True)
class RecordedState:
    """A state that a function would keep."""

    shape: tuple[int, ...]
    wide: bool  # in float32, whatever the model's dtype is

    @property
    def numbers(self) -> int:
        """How many."""
        return math.prod(self.shape)

    def tensor(self, dtype: torch.dtype) -> StateTensor:
        """As a model of this dtype keeps it."""
        return StateTensor(self.shape, torch.float32 if self.wide else dtype)


@contextmanager
def recurring(recur: Recur) -> Iterator[None]:
    """Text models that run in this thread meanwhile read and keep the states of a step."""
    _step.recur, _step.number = recur, 0
    try:
        yield
    finally:
        del _step.recur, _step.number


@contextmanager
def recording(record: Callable[[str, RecordedState], None]) -> Iterator[None]:
    """Text models that run in this thread meanwhile tell of every state, the function that would keep it and what, and
    compute nothing from token to token."""
    _step.record = record
    try:
        yield
    finally:
        del _step.record


def intercept(layers: nn.ModuleList) -> None:
    """See to it that the functions of these layers' modelling modules heed `recurring`."""
    for name in {type(module).__module__ for module in layers.modules()}:
        modelling: Any = sys.modules[name]
        single: Any = getattr(modelling, _SINGLE, None)
        for function, packed in ((_CONVOLUTION, _convolve), (_CHUNKED, functools.partial(_delta_rule, single))):
            own = getattr(modelling, function, None)
            if own is not None and not hasattr(own, "heeds_recurring"):
                setattr(modelling, function, _heeding(function, own, packed))


def _heeding(name: str, own: Callable[..., Any], packed: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def call(*tensors: Any, **options: Any) -> Any:
        record = getattr(_step, "record", None)
        if record is not None:
            record(name, _state_of(name, *tensors))
            return tensors[0] if name == _CONVOLUTION else (torch.empty_like(tensors[2]), None)
        return own(*tensors, **options) if getattr(_step, "recur", None) is None else packed(own, *tensors, **options)

    call.heeds_recurring = True  # type: ignore[attr-defined]
    return call


def _state_of(name: str, first: torch.Tensor, second: torch.Tensor, third: Any, *_: Any) -> RecordedState:
    """Of a convolution, given rows and weight: the rows that it still sees. Of a delta rule, given queries, keys and
    values: a matrix for each head of the values."""
    if name == _CONVOLUTION:
        return RecordedState((first.shape[1], second.shape[-1] - 1), wide=False)
    return RecordedState((third.shape[2], second.shape[3], third.shape[3]), wide=True)


def _next() -> tuple[Recur, int]:
    number = _step.number
    _step.number += 1
    return _step.recur, number


def _convolve(
    own: Callable[..., torch.Tensor], hidden: torch.Tensor, weight: torch.Tensor, *rest: Any, **options: Any
) -> torch.Tensor:
    """hidden [1, channels, T], weight [channels, width] -> [1, channels, T]."""
    recur, number = _next()
    before = weight.shape[-1] - 1
    rows, out = hidden[0].T, torch.empty_like(hidden)
    for runs in recur.groups:
        seen = torch.cat([recur.before(number, runs), runs.gather(rows).transpose(1, 2)], -1)
        recur.keep(number, runs, _last(seen, runs, before))
        made = own(seen, weight, *rest, **options)[:, :, before:]
        runs.scatter(made.transpose(1, 2), out[0].T)
    return out


def _last(seen: torch.Tensor, runs: Runs, count: int) -> torch.Tensor:
    """The `count` columns of [n, channels, count + L] with which each run ends."""
    if runs.places is None:
        return seen[:, :, seen.shape[2] - count :]
    columns = runs.lengths[:, None] + torch.arange(count, device=seen.device)
    return seen.gather(2, columns[:, None].expand(-1, seen.shape[1], -1))


def _delta_rule(
    single: Callable[..., Any],
    own: Callable[..., Any],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: None = None,
    output_final_state: bool = False,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """query and key [1, T, key heads, d], value [1, T, heads, e], g and beta [1, T, heads] -> [1, T, heads, e]."""
    recur, number = _next()
    out = torch.empty_like(value)
    for runs in recur.groups:
        q, k, v, decay, rate = (runs.gather(x[0]) for x in (query, key, value, g, beta))
        if runs.places is not None:  # a token of no decay and no rate changes nothing
            behind = torch.arange(q.shape[1], device=q.device) >= runs.lengths[:, None]
            decay, rate = (x.masked_fill(behind[..., None], 0) for x in (decay, rate))
        rule = single if q.shape[1] == 1 else own
        state = recur.before(number, runs)
        made, state = rule(q, k, v, g=decay, beta=rate, initial_state=state, output_final_state=True, **options)
        recur.keep(number, runs, state)
        runs.scatter(made, out[0])
    return out, None


class Renumbered:
    """An `Attend` for the layers of a model that attend."""

    def __init__(self, attend: Attend, numbers: dict[int, int]) -> None:
        """`numbers`: of each such layer among them."""
        self._attend, self._numbers = attend, numbers

    @property
    def calls(self) -> AttentionCalls | None:
        return None

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self._attend(self._numbers[layer], q, k, v)
