"""What is proven of vLLM's model before it serves: no vision weight, and every token where the family places it."""

from __future__ import annotations

import numpy as np
from vllm.v1.engine.async_llm import AsyncLLM

from lookonce.models.checkpoint import Checkpoint
from lookonce.models.self_check import SelfCheckFailed

_VISION = ("visual.", "model.visual.", "vision_tower.", "model.vision_tower.", "vision_model.")
_BEFORE, _BETWEEN, _BEHIND = 5, 3, 7  # tokens of text around two images
_SIDES = ((2, 3), (4, 1))  # merged rows and columns of each


async def check_model(llm: AsyncLLM, checkpoint: Checkpoint) -> None:
    """Raises SelfCheckFailed."""
    for names in await llm.collective_rpc("lookonce_parameters"):
        found = [name for name in names if name.startswith(_VISION)]
        if found:
            raise SelfCheckFailed(
                f"vLLM has loaded vision weights, {found[0]} first; it must hold the language half only"
            )
    token_ids, images = _sample(checkpoint)
    layout = [(offset, grid) for offset, _, grid in images]
    expected, following = checkpoint.family.positions(checkpoint.config, len(token_ids), layout)
    for [next_there], *rows in await llm.collective_rpc("lookonce_positions", args=(token_ids, images)):
        if next_there != following or not np.array_equal(np.array(rows), expected):
            raise SelfCheckFailed("vLLM places the tokens of images elsewhere than this family does")


def _sample(checkpoint: Checkpoint) -> tuple[list[int], list[tuple[int, int, tuple[int, int, int]]]]:
    """Tokens of a prompt with two images; offset, tokens and grid of each."""
    family, config, merge = checkpoint.family, checkpoint.config, checkpoint.merge_size
    image_id = family.special_tokens(config).image_id
    token_ids, images = [0] * _BEFORE, []
    for rows, columns in _SIDES:
        grid = (1, rows * merge, columns * merge)
        tokens = family.tokens_per_grid(config, grid)
        images.append((len(token_ids), tokens, grid))
        token_ids += [image_id] * tokens + [0] * _BETWEEN
    return token_ids + [0] * _BEHIND, images
