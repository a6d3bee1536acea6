"""Checks of a loaded half against its own class, before anything is served by it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import structlog
import torch
from torch.nn import functional

from lookonce.core.errors import CheckpointError
from lookonce.models.general.attention import NAME
from lookonce.models.general.decoder import GeneralText

log = structlog.get_logger(__name__)
_ROWS, _TEXT, _MARKERS = 5, 7, 16
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Of log-probabilities: of each in float32, of their mean where a step of a narrower dtype is rounded."""


class _Causal:
    """An `Attend` over one sequence: plain causal attention."""

    calls = None

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
        out = functional.scaled_dot_product_attention(q.transpose(0, 1), k, v, is_causal=True)
        return out.transpose(0, 1).flatten(1)


class _Features:
    """What an encoder answers, of which nothing is there but the rows."""

    def __init__(self, pooler_output: Any) -> None:
        self.pooler_output = pooler_output

    def __getattr__(self, name: str) -> None:
        return None


@torch.inference_mode()
def check_text(model: GeneralText, image_id: int, markers: Iterable[int] = ()) -> float:
    """The greatest difference between log-probabilities of the packed step and of the class's own forward, over a
    prompt with random rows for an image and some of its markers. Raises CheckpointError when it is beyond rounding."""
    ids, rows = _prompt(model, image_id, sorted(set(markers))[:_MARKERS])
    expected = _own_logits(model, ids, rows).float().log_softmax(-1)
    hidden = model.embed(ids)
    hidden[ids == image_id] = rows
    places, everything = torch.arange(len(ids), device=ids.device)[None], torch.arange(len(ids), device=ids.device)
    found = model.forward(hidden, places, _Causal(), everything).float().log_softmax(-1)
    apart = (found - expected).abs()
    worst = float(apart.max() if model.shape.dtype == torch.float32 else apart.mean())
    log.info("language half checked against its class", family=type(model.model).__name__, difference=worst)
    if not worst <= _TOLERANCE[model.shape.dtype] or not math.isfinite(worst):
        raise CheckpointError(
            f"{type(model.model).__name__}: the packed step of the general path differs from the class's own forward "
            f"by {worst:.2g} in a log-probability; it is not served: use vLLM or transformers for it"
        )
    return worst


def _prompt(model: GeneralText, image_id: int, markers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids with a few of an image's among text, and its rows."""
    shape, generator = model.shape, torch.Generator().manual_seed(0)
    ids = torch.randint(shape.vocabulary, (_TEXT + _ROWS + len(markers),), generator=generator)
    ids[_TEXT + _ROWS :] = torch.tensor(markers, dtype=torch.int64)
    ids[ids == image_id] = (image_id + 1) % shape.vocabulary
    ids[2 : 2 + _ROWS] = image_id
    ids = ids.to(shape.device)
    spread = model.embed(ids[:1]).float().std().item() or 1.0
    rows = spread * torch.randn(_ROWS, shape.hidden, generator=generator)
    return ids, rows.to(shape.device, shape.dtype)


def _own_logits(model: GeneralText, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[T, vocabulary] by the class, given features as if of an encoder; each class takes one of these forms."""
    inner: Any = model.model
    decoder = inner.get_submodule(model.decoder_name)
    decoder.set_attn_implementation("eager")
    failure: Exception | None = None
    try:
        for form in ([rows], rows[None], rows):
            features = _Features(form)
            try:
                out = inner(
                    pixel_values=None,
                    input_ids=ids[None],
                    attention_mask=torch.ones_like(ids)[None],
                    mm_encoder_outputs={"image": features},
                    use_cache=False,
                )
            except (ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
                failure = failure or error
                continue
            logits: torch.Tensor = out.logits[0]
            return logits
    finally:
        decoder.set_attn_implementation(NAME)
    raise CheckpointError(
        f"{type(inner).__name__}: its own forward can't be run with image features from elsewhere "
        f"({type(failure).__name__}); the general path does not serve it"
    ) from failure
