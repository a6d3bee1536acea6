"""transformers' attention interface over an engine's `Attend`: unmodified text models run a packed step.

Registered once under the name `lookonce`, with a mask function that makes no mask: who sees whom is the engine's.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from lookonce.models.text_adapter import Attend

NAME = "lookonce"
_UNKNOWN = ("s_aux", "position_bias")
_step = threading.local()


Limits = dict[int, tuple[int | None, float | None, bool]]
"""What layers ask for, by their numbers: a sliding window, a soft cap of scores, and whether they are causal."""


class Unpacked(Exception):
    """The text model asks attention for something that `Attend` does not know; its text says what."""


@contextmanager
def attending(attend: Attend, limits: Limits | None = None) -> Iterator[None]:
    """Text models that run in this thread meanwhile attend by it. `limits` is told what else layers ask for, which
    an engine reads in the model's shape."""
    _step.attend, _step.limits = attend, limits
    try:
        yield
    finally:
        del _step.attend, _step.limits


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, heads, T, d], key and value [1, kv_heads, T, d] -> [1, T, heads, d]."""
    for name in _UNKNOWN:
        if options.get(name) is not None:
            raise Unpacked(name)
    if attention_mask is not None:
        raise Unpacked("a mask of its own")
    if key.shape != value.shape or key.shape[2] != query.shape[2]:
        raise Unpacked("keys of another size than values or queries")
    if _step.limits is not None:
        causal = options.get("is_causal", getattr(module, "is_causal", True)) is not False
        _step.limits[module.layer_idx] = (options.get("sliding_window"), options.get("softcap"), causal)
    size = query.shape[-1]
    own = size**-0.5
    if scaling is not None and scaling != own:
        query = query * (scaling / own)
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    out: torch.Tensor = _step.attend(module.layer_idx, q, k, v)
    return out.view(1, q.shape[0], -1, size), None


def _no_mask(*_: Any, **__: Any) -> None:
    return None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _no_mask)
