"""One packed step of an embedding model: whole prompts next to each other, each attending to itself, pooled rows out.

No keys or values outlive the step: nothing is decoded, and vectors are kept by who asked for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from lm_service.engine.types import Prompt
from lookonce.models.text_adapter import AttentionCalls, Deepstack, ModelAdapter
from lookonce.models.vector_layout import Pooling


@dataclass(frozen=True)
class Filled:
    """A prompt and its images' rows, each [tokens, hidden] or [1 + deepstack, tokens, hidden], in order."""

    prompt: Prompt
    rows: tuple[torch.Tensor, ...]

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.prompt.token_ids)


class CausalPrompts:
    """An `Attend` over whole prompts: each token sees those before it in its own."""

    calls: AttentionCalls | None = None

    def __init__(self, lengths: Sequence[int]) -> None:
        ends = np.cumsum([0, *lengths]).tolist()
        self._spans = [slice(*pair) for pair in pairwise(ends)]

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See `Attend`."""
        out = q.new_empty(q.shape)
        for span in self._spans:
            asked, keys, values = (x[span].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
            mixed = functional.scaled_dot_product_attention(asked, keys, values, is_causal=True, enable_gqa=True)
            out[span] = mixed[0].transpose(0, 1)
        return out.flatten(1)


@torch.inference_mode()
def vectors_of(model: ModelAdapter, pooling: Pooling, filled: Sequence[Filled]) -> list[NDArray[np.float32]]:
    """Float32 [rows, width] of each prompt, rows of length 1; not finite where the model's numbers are not."""
    device, lengths = model.shape.device, [one.length for one in filled]
    ids = np.concatenate([one.prompt.token_ids for one in filled]).astype(np.int64)
    positions = np.concatenate([one.prompt.positions for one in filled], axis=1)
    hidden = model.embed(torch.from_numpy(ids).to(device))
    deepstack = list(_place_images(hidden, filled))
    ends = np.cumsum(lengths)
    wanted = torch.from_numpy(ends - 1 if pooling == "last" else np.arange(ends[-1])).to(device)
    further = (deepstack,) if deepstack else ()
    rows = model.forward(hidden, torch.from_numpy(positions).to(device), CausalPrompts(lengths), wanted, *further)
    pooled = _pooled(rows.float(), pooling, lengths)
    return [(part / part.norm(dim=-1, keepdim=True)).cpu().numpy() for part in pooled]


def _pooled(rows: torch.Tensor, pooling: Pooling, lengths: Sequence[int]) -> Sequence[torch.Tensor]:
    if pooling == "last":
        return torch.split(rows, 1)
    parts = torch.split(rows, list(lengths))
    return parts if pooling == "tokens" else [part.mean(0, keepdim=True) for part in parts]


def _place_images(hidden: torch.Tensor, filled: Sequence[Filled]) -> Iterator[Deepstack]:
    """Write the embeddings' rows over the placeholders; what is to be added behind the first layers."""
    begin = 0
    for one in filled:
        for span, rows in zip(one.prompt.images, one.rows, strict=True):
            levels = rows if rows.dim() == 3 else rows[None]
            for place, row, count in span.runs:
                part = levels[:, row : row + count]
                hidden[begin + place : begin + place + count] = part[0]
                if len(part) > 1:
                    yield Deepstack(begin + place, part[1:])
        begin += one.length
