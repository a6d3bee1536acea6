"""Which tokens of a prompt see those behind them, too: read off the masks that a class makes for a small prompt.

A class whose attention depends on the kinds of tokens has a function of its own that makes masks for `generate`. It
needs the config and no weight.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from lookonce.models.general.architecture import Architecture, parsed
from lookonce.models.general.positions import Run, image_types, position_rows
from lookonce.models.text_adapter import BothWays

TYPES = ("token_type_ids", "mm_token_type_ids")
"""What classes call the kinds of tokens."""
_MASKS = "create_masks_for_generate"
_LENGTH, _RUNS, _WINDOW = 12, ((2, 5), (8, 2)), 3  # of the small prompt: tokens, its images, and a window


class UnknownMask(Exception):
    """The class's tokens see others than `AttentionRules` can say; its text says of what they depend."""


def visible(length: int, window: int | None, blocks: Iterable[Run], *, within_window: bool) -> torch.Tensor:
    """bool [length, length]: whether each token (row) sees each other one; those of a block see one another."""
    places = torch.arange(length)
    near = places > places[:, None] - window if window is not None else torch.ones(length, length, dtype=torch.bool)
    block = torch.zeros(length, dtype=torch.int64)
    for number, (start, count) in enumerate(blocks, 1):
        block[start : start + count] = number
    together = (block[:, None] == block) & (block > 0)
    causal = places <= places[:, None]
    return (causal | together) & near if within_window else (causal & near) | together


def type_name(model: Any) -> str | None:
    """The argument of a class's forward that is given the kinds of tokens."""
    taken, inner = (inspect.signature(type(each).forward).parameters for each in (model, model.base_model))
    return next((name for name in TYPES if name in taken or name in inner), None)


def blocks_of_class(architecture: Architecture) -> tuple[BothWays | None, bool]:
    """Which tokens see one another both ways, and whether a window bounds that (see `AttentionRules`). Raises
    UnknownMask."""
    name, make = type_name(architecture.model), getattr(architecture.cls, _MASKS, None)
    if name is None or (make is None and position_rows(architecture.model) > 1):
        return None, True
    if make is None:
        raise UnknownMask(f"attention or positions depend on which tokens are an image's ({name})")
    text, of_images = (_masks(architecture, make, name, runs) for runs in ((), _RUNS))
    for within_window in (True, False):
        if _same(text, [(0, _LENGTH)], within_window=within_window):
            return BothWays.PROMPT, within_window
        if _same(text, (), within_window=True) and _same(of_images, _RUNS, within_window=within_window):
            return BothWays.IMAGES, within_window
    if _same(text, (), within_window=True) and _same(of_images, (), within_window=True):
        return None, True
    raise UnknownMask(f"who sees whom depends on which tokens are an image's ({name}) in a way that is not known")


def _masks(
    architecture: Architecture, make: Callable[..., Any], name: str, runs: Sequence[Run]
) -> dict[str, torch.Tensor]:
    """bool [length, length] by kind of layer."""
    config = parsed(architecture.raw)
    config._attn_implementation = "eager"
    text: Any = config.get_text_config()
    if getattr(text, "sliding_window", None):
        text.sliding_window = _WINDOW
    try:
        made = make(
            config=config,
            inputs_embeds=torch.zeros(1, _LENGTH, 1),
            attention_mask=None,
            past_key_values=None,
            position_ids=torch.arange(_LENGTH)[None],
            is_first_iteration=True,
            **{name: image_types(_LENGTH, runs)},
        )
    except Exception as error:
        raise UnknownMask(f"its masks can't be made without weights ({type(error).__name__})") from error
    by_kind = made if isinstance(made, dict) else {"full_attention": made}
    return {kind: mask[0, 0] == 0 for kind, mask in by_kind.items()}


def _same(masks: dict[str, torch.Tensor], blocks: Sequence[Run], *, within_window: bool) -> bool:
    windows = {"full_attention": None, "sliding_attention": _WINDOW}
    return all(
        kind in windows and torch.equal(mask, visible(_LENGTH, windows[kind], blocks, within_window=within_window))
        for kind, mask in masks.items()
    )
