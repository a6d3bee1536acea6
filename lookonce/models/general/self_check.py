"""Checks of a loaded half against its own class, before anything is served by it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import structlog
import torch

from lookonce.core.errors import CheckpointError
from lookonce.models.family import Grid
from lookonce.models.general.attention import NAME
from lookonce.models.general.blocks import type_name
from lookonce.models.general.decoder import GeneralText
from lookonce.models.general.one_sequence import OneSequence
from lookonce.models.general.positions import Run, image_types, rope_positions
from lookonce.models.general.prompts import ImageText
from lookonce.models.general.unbatched import FORMS, GeneralUnbatched, ImageFeatures
from lookonce.models.self_check import SelfCheckFailed
from lookonce.models.text_adapter import BothWays
from lookonce.models.unbatched import ImageRows, UnbatchedPrompt

log = structlog.get_logger(__name__)
_ROWS, _TEXT, _MARKERS, _BEFORE, _WINDOW, _LAST, _STEPS = 5, 7, 16, 2, 3, 4, 4
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Of log-probabilities: of each in float32, of their mean where a step of a narrower dtype is rounded."""
_OWN = 4
"""Times as much as the class's own ways of attending differ by is rounding too."""


@torch.inference_mode()
def check_text(model: GeneralText, image_id: int, image: ImageText) -> float:
    """The greatest difference between log-probabilities of packed steps and of the class's own forward, over a
    prompt with random rows for an image, whole where its positions follow its grid, and some of the markers of
    `image`. Raises CheckpointError when it is beyond rounding."""
    count = image.tokens if image.grid is not None and model.shape.position_rows > 1 else _ROWS
    ids, rows = _prompt(model, image_id, count, sorted({number for _, number in image.markers})[:_MARKERS])
    run = (_BEFORE, count)
    own, blocks = _kinds(model, len(ids), run)
    places = torch.arange(len(ids), device=ids.device)[None]
    if count is not _ROWS and image.grid is not None:
        places = torch.from_numpy(rope_positions(model.model, len(ids), [(run, image.grid)])).to(ids.device)
        own = {"mm_token_type_ids": image_types(len(ids), [run]), "image_grid_thw": torch.tensor([image.grid])}
    hidden = model.embed(ids)
    hidden[ids == image_id] = rows
    rules, window = model.shape.rules, None
    with ExitStack() as stack:
        if rules is not None and any(rules.windows):
            window = _WINDOW
            stack.enter_context(_window_of(model, window))
        sequence = OneSequence(model.shape, blocks, len(ids), window)
        found = _in_parts(model, hidden, places, sequence).float().log_softmax(-1)
        ways = ("eager",) if rules is not None and rules.softcap is not None else ("eager", "sdpa")
        told = [_own_logits(model, ids, rows, how, own).float().log_softmax(-1) for how in ways]
    expected, again = told[0], told[-1]
    exact = model.shape.dtype == torch.float32
    worst, rounding = (_apart(each, expected, exact=exact) for each in (found, again))
    log.info("language half checked against its class", family=type(model.model).__name__, difference=worst)
    if not worst <= max(_TOLERANCE[model.shape.dtype], _OWN * rounding) or not math.isfinite(worst):
        raise SelfCheckFailed(
            f"{type(model.model).__name__}: the packed step of the general path differs from the class's own forward "
            f"by {worst:.2g} in a log-probability; it is not served: use vLLM or transformers for it"
        )
    return worst


def _in_parts(model: GeneralText, hidden: torch.Tensor, places: torch.Tensor, sequence: OneSequence) -> torch.Tensor:
    """[T, vocabulary] by packed steps. Where the model keeps states: of all but the last tokens, one further, and the
    others, each part going on from the keys, values and states of the one before it."""
    logits, recurrent, length = [], bool(model.shape.states), len(hidden)
    ends = [length - _LAST, length - _LAST + 1, length] if recurrent else [length]
    for start, end in itertools.pairwise([0, *ends]):
        sequence.begin(end - start)
        rows, at = torch.arange(end - start, device=hidden.device), places[:, start:end]
        logits.append(model.forward(hidden[start:end], at, sequence, rows, recur=sequence if recurrent else None))
    return torch.cat(logits)


def _kinds(model: GeneralText, length: int, run: Run) -> tuple[dict[str, Any], list[Run]]:
    """What the class is told of the kinds of tokens, and which tokens see one another by the model's rules."""
    both_ways = model.shape.rules.both_ways if model.shape.rules is not None else None
    blocks = {BothWays.IMAGES: [run], BothWays.PROMPT: [(0, length)]}.get(both_ways, []) if both_ways else []
    name = type_name(model.model) if model.shape.position_rows == 1 else None
    runs = [] if both_ways is BothWays.PROMPT else [run]
    return ({} if name is None else {name: image_types(length, runs)}), blocks


@contextmanager
def _window_of(model: GeneralText, tokens: int) -> Iterator[None]:
    """The class's windows are so small that a short prompt shows them."""
    inner: Any = model.model
    configs = {
        id(each): each for each in (inner.config.get_text_config(), inner.get_submodule(model.decoder_name).config)
    }
    before = {each: config.sliding_window for each, config in configs.items()}
    try:
        for config in configs.values():
            config.sliding_window = tokens
        yield
    finally:
        for each, config in configs.items():
            config.sliding_window = before[each]


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
