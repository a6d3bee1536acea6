"""Each half of a model of the Qwen lines as transformers' own modules: what `lookonce.models.qwen2_vl.modules` and its
successors are held against, here and in benchmarks."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from lookonce.models.checkpoint.checkpoint import Checkpoint
from lookonce.models.checkpoint.weights import load_weights
from lookonce.models.registry import Half

_ATTENTION = "sdpa"
_Module = TypeVar("_Module", bound=torch.nn.Module)


def whole_on_meta(checkpoint: Checkpoint) -> Any:
    """The checkpoint's class of transformers, without weights, from a flat or a nested config.json."""
    config: Any = CONFIG_MAPPING[checkpoint.family.model_type].from_dict(checkpoint.config)
    config._attn_implementation = _ATTENTION
    with torch.device("meta"):
        return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)](config)


def load_vision_tower(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """The vision tower in eval mode.

    It takes pixel patches [P, numbers] and grid_thw [images, 3] and answers with pooler_output [tokens, hidden].
    """
    tower = whole_on_meta(checkpoint).model.visual
    _compute_buffers(tower)
    load_weights(tower, checkpoint, Half.VISION, dtype=dtype, device=device)
    return _frozen(tower)


def load_language_model(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[Any, torch.nn.Linear]:
    """The text model and its output head in eval mode; a tied head shares the embedding's parameter.

    The text model takes inputs_embeds [batch, T, hidden], M-RoPE position_ids [3, batch, T] and past_key_values.
    """
    whole = whole_on_meta(checkpoint)
    model, head = whole.model.language_model, whole.lm_head
    halves = torch.nn.ModuleDict({"model": model, "lm_head": head})
    _compute_buffers(halves)
    load_weights(halves, checkpoint, Half.LANGUAGE, dtype=dtype, device=device)
    return _frozen(model), _frozen(head)


def _compute_buffers(module: torch.nn.Module) -> None:
    """Those that no checkpoint stores (rotary frequencies): of each owner, built anew from its `config` off the meta
    device."""
    for owner in module.modules():
        hollow = [name for name, buffer in owner.named_buffers(recurse=False) if buffer.is_meta]
        fresh: Any = type(owner)(owner.config) if hollow else None
        for name in hollow:
            owner.register_buffer(name, fresh.get_buffer(name), persistent=False)


def _frozen(module: _Module) -> _Module:
    module.requires_grad_(False)
    module.train(False)
    return module
