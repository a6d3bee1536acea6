"""Checks of a loaded half against its own class, before anything is served by it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import structlog
import torch
from torch.nn import functional

from lookonce.core.errors import CheckpointError
from lookonce.models.family import Grid
from lookonce.models.general.attention import NAME
from lookonce.models.general.decoder import GeneralText
from lookonce.models.general.positions import image_types, rope_positions
from lookonce.models.general.prompts import ImageText
from lookonce.models.general.unbatched import FORMS, GeneralUnbatched, ImageFeatures
from lookonce.models.self_check import SelfCheckFailed
from lookonce.models.unbatched import ImageRows, UnbatchedPrompt

log = structlog.get_logger(__name__)
_ROWS, _TEXT, _MARKERS, _BEFORE, _STEPS = 5, 7, 16, 2, 4
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Of log-probabilities: of each in float32, of their mean where a step of a narrower dtype is rounded."""
_OWN = 4
"""Times as much as the class's own ways of attending differ by is rounding too."""


class _Causal:
    """An `Attend` over one sequence: plain causal attention."""

    calls = None

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
        out = functional.scaled_dot_product_attention(q.transpose(0, 1), k, v, is_causal=True)
        return out.transpose(0, 1).flatten(1)


@torch.inference_mode()
def check_text(model: GeneralText, image_id: int, image: ImageText) -> float:
    """The greatest difference between log-probabilities of the packed step and of the class's own forward, over a
    prompt with random rows for an image, whole where its positions follow its grid, and some of the markers of
    `image`. Raises CheckpointError when it is beyond rounding."""
    count = image.tokens if image.grid is not None and model.shape.position_rows > 1 else _ROWS
    ids, rows = _prompt(model, image_id, count, sorted({number for _, number in image.markers})[:_MARKERS])
    own: dict[str, Any] = {}
    places, everything = torch.arange(len(ids), device=ids.device)[None], torch.arange(len(ids), device=ids.device)
    if count is not _ROWS and image.grid is not None:
        run = (_BEFORE, count)
        places = torch.from_numpy(rope_positions(model.model, len(ids), [(run, image.grid)])).to(ids.device)
        own = {"mm_token_type_ids": image_types(len(ids), [run]), "image_grid_thw": torch.tensor([image.grid])}
    expected, again = (_own_logits(model, ids, rows, how, own).float().log_softmax(-1) for how in ("eager", "sdpa"))
    hidden = model.embed(ids)
    hidden[ids == image_id] = rows
    found = model.forward(hidden, places, _Causal(), everything).float().log_softmax(-1)
    exact = model.shape.dtype == torch.float32
    worst, rounding = (_apart(each, expected, exact=exact) for each in (found, again))
    log.info("language half checked against its class", family=type(model.model).__name__, difference=worst)
    if not worst <= max(_TOLERANCE[model.shape.dtype], _OWN * rounding) or not math.isfinite(worst):
        raise SelfCheckFailed(
            f"{type(model.model).__name__}: the packed step of the general path differs from the class's own forward "
            f"by {worst:.2g} in a log-probability; it is not served: use vLLM or transformers for it"
        )
    return worst


def _prompt(model: GeneralText, image_id: int, count: int, markers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids with a few of an image's among text, and its rows."""
    shape, generator = model.shape, torch.Generator().manual_seed(0)
    ids = torch.randint(shape.vocabulary, (_TEXT + count + len(markers),), generator=generator)
    ids[_TEXT + count :] = torch.tensor(markers, dtype=torch.int64)
    ids[ids == image_id] = (image_id + 1) % shape.vocabulary
    ids[_BEFORE : _BEFORE + count] = image_id
    ids = ids.to(shape.device)
    spread = model.embed(ids[:1]).float().std().item() or 1.0
    rows = spread * torch.randn(count, shape.hidden, generator=generator)
    return ids, rows.to(shape.device, shape.dtype)


@torch.inference_mode()
def check_unbatched(model: GeneralUnbatched, image_id: int, image: ImageText, grid: Grid) -> float:
    """The greatest difference between log-probabilities of the class's cached steps, one token after the other, and of
    its forward over all of them at once, behind a prompt with random rows for an image of this grid; how the class
    takes rows is found out on the way. Raises SelfCheckFailed when it is beyond rounding."""
    shape, name = model.shape, type(model.cls).__name__
    count = image.tokens if model.needs_whole_images or image.grid is not None else _ROWS
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(shape.vocabulary, (_TEXT + count + _STEPS,), generator=generator)
    ids[ids == image_id] = (image_id + 1) % shape.vocabulary
    ids[_BEFORE : _BEFORE + count] = image_id
    *asked, last = ids.tolist()
    asked, answer = asked[: _TEXT + count], [*asked[_TEXT + count :], last]
    rows = model.spread * torch.randn(count, shape.hidden, generator=generator)
    prompt = UnbatchedPrompt(asked, [ImageRows(grid, rows.to(shape.device, shape.dtype))], "what is it?")
    expected = _whole(model, prompt, answer[:-1])
    found: list[torch.Tensor] = []

    def choose(logits: torch.Tensor) -> tuple[int, bool]:
        found.append(logits.float().log_softmax(-1))
        return answer[len(found) - 1], len(found) == len(answer)

    model.generate(model.begin(prompt), choose)
    worst = _apart(torch.stack(found), expected, exact=shape.dtype == torch.float32)
    log.info("language half checked against its class", family=name, difference=worst)
    if not worst <= _TOLERANCE[shape.dtype] or not math.isfinite(worst):
        raise SelfCheckFailed(
            f"{name}: its steps with a cache differ from its forward without one by {worst:.2g} in a log-probability; "
            "it is not served: use vLLM or transformers for it"
        )
    return worst


def _whole(model: GeneralUnbatched, prompt: UnbatchedPrompt, answer: Sequence[int]) -> torch.Tensor:
    """Log-probabilities [1 + answer, vocabulary] by the class's forward; each takes rows in one of some forms."""
    failure: Exception | None = None
    for form in FORMS:
        model.form = form
        try:
            return model.whole(prompt, answer).float().log_softmax(-1)
        except (ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
            failure = failure or error
    name = type(model.cls).__name__
    raise SelfCheckFailed(
        f"{name}: its own forward can't be run with image features from elsewhere ({type(failure).__name__}); the "
        "general path does not serve it"
    ) from failure


def _apart(one: torch.Tensor, other: torch.Tensor, *, exact: bool) -> float:
    apart = (one - other).abs()
    return float(apart.max() if exact else apart.mean())


def _own_logits(
    model: GeneralText, ids: torch.Tensor, rows: torch.Tensor, how: str, further: dict[str, Any]
) -> torch.Tensor:
    """[T, vocabulary] by the class, given features as if of an encoder; each class takes one of these forms."""
    inner: Any = model.model
    decoder = inner.get_submodule(model.decoder_name)
    failure: Exception | None = None
    try:
        decoder.set_attn_implementation(how)
        for form in ([rows], rows[None], rows):
            features = ImageFeatures(form)
            try:
                out = inner(
                    pixel_values=None,
                    input_ids=ids[None],
                    attention_mask=torch.ones_like(ids)[None],
                    mm_encoder_outputs={"image": features},
                    use_cache=False,
                    **{name: x.to(ids.device) for name, x in further.items()},
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
