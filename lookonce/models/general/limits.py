"""What of a class the general path can't compute, found without weights: by names, and by one pass on the meta device.

The pass runs the text model with an `Attend` that records who calls it: a layer that keeps state of another kind than
keys and values doesn't call it, and a window, a soft cap or a sink comes with the call.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from lookonce.core.errors import CheckpointError
from lookonce.models.general.architecture import Architecture
from lookonce.models.general.attention import NAME, Unpacked, attending
from lookonce.models.general.positions import position_rows

_TOKENS = 3  # of the pass
_BY_TYPES = ("token_type_ids", "mm_token_type_ids")
_READS_TEXT = ("input_ids", "qformer_input_ids")
_LEAST_WINDOW = 1024
"""Of attention: a longer one bounds the context instead."""
_ELSEWHERE = "use vLLM or transformers for it"


@dataclass(frozen=True)
class Calls:
    """How the text model calls attention: the same in every layer."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None  # tokens of the shortest sliding window: no sequence may be longer


class _Recorder:
    """An `Attend` that answers nothing."""

    calls = None

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, int, int]] = []

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.seen.append((layer, q.shape[1], k.shape[1], q.shape[2]))
        return q.flatten(1)


def class_problems(architecture: Architecture) -> Iterator[str]:
    """Why no engine serves the class, one sentence each."""
    cls = architecture.cls
    subject = f"config.json: {cls.__name__} is not served by the general path"
    if "mm_encoder_outputs" not in inspect.signature(cls.forward).parameters or not hasattr(cls, "get_image_features"):
        yield f"{subject}: it takes no image features computed elsewhere; {_ELSEWHERE}"
        return
    if getattr(getattr(architecture.config, "vision_config", None), "deepstack_visual_indexes", None):
        yield f"{subject}: its vision half has deepstack features; {_ELSEWHERE}"
    named = [name for name in inspect.signature(cls.get_image_features).parameters if name in _READS_TEXT]
    if named and not architecture.reads_text:
        yield f"{subject}: its vision half reads the question ({named[0]}); {_ELSEWHERE}"
    try:
        _ = architecture.language
    except CheckpointError as error:
        yield from error.problems


@lru_cache(maxsize=8)
def unpacked(architecture: Architecture) -> str | None:
    """Why the packed engine can't run a class that has no problems, a clause after its name; None: it can. The plain
    engine serves such a class."""
    cls = architecture.cls
    if architecture.is_encoder_decoder:
        return "its language model is an encoder and a decoder"
    if architecture.reads_text:
        return "its Q-Former reads the question"
    inner = inspect.signature(type(architecture.model.base_model).forward).parameters
    named = [name for name in _BY_TYPES if name in inspect.signature(cls.forward).parameters or name in inner]
    named += [name for name in ("get_rope_index",) if hasattr(architecture.model.base_model, name)]
    if named and position_rows(architecture.model) == 1:
        return (
            f"attention or positions depend on which tokens are an image's ({named[0]}), which the packed step doesn't "
            "know"
        )
    try:
        attention_calls(architecture)
    except CheckpointError as error:
        return error.problems[0].partition("general path: ")[2].removesuffix(f"; {_ELSEWHERE}") or error.problems[0]
    return None


@lru_cache(maxsize=8)
def attention_calls(architecture: Architecture) -> Calls:
    """One pass of the text model on the meta device. Raises CheckpointError naming what is unknown."""
    model: Any = architecture.model.get_submodule(architecture.decoder_name)
    subject = f"config.json: {architecture.cls.__name__} is not served by the general path"
    recorder, windows = _Recorder(), set[int]()
    try:
        model.set_attn_implementation(NAME)
        width = model.embed_tokens.weight.shape[1]
        with torch.inference_mode(), torch.device("meta"), attending(recorder, windows):
            hidden = torch.empty(1, _TOKENS, width, dtype=model.embed_tokens.weight.dtype)
            places, mask = torch.arange(_TOKENS)[None], torch.ones(1, _TOKENS, dtype=torch.int64)
            out = model(inputs_embeds=hidden, attention_mask=mask, position_ids=places, use_cache=False)
    except Unpacked as error:
        raise CheckpointError(f"{subject}: its attention has {error}; {_ELSEWHERE}") from None
    except Exception as error:
        raise CheckpointError(
            f"{subject}: its text model can't be run packed ({type(error).__name__}); {_ELSEWHERE}"
        ) from error
    layers = len(model.layers)
    shapes = {seen[1:] for seen in recorder.seen}
    if [seen[0] for seen in recorder.seen] != list(range(layers)) or len(shapes) != 1:
        raise CheckpointError(
            f"{subject}: not every layer attends once over keys and values of one size (recurrent state, "
            f"cross-attention or mixed layers); {_ELSEWHERE}"
        )
    if tuple(out.last_hidden_state.shape) != (1, _TOKENS, width):
        raise CheckpointError(f"{subject}: its text model answers rows of another width; {_ELSEWHERE}")
    heads, kv_heads, head_dim = shapes.pop()
    if heads % kv_heads:
        raise CheckpointError(f"{subject}: {heads} heads are no multiple of {kv_heads} key-value heads; {_ELSEWHERE}")
    window = min(windows, default=None)
    context = getattr(architecture.config.get_text_config(), "max_position_embeddings", None) or _LEAST_WINDOW
    if window is not None and window < min(_LEAST_WINDOW, context):
        raise CheckpointError(f"{subject}: its attention has a sliding window of {window} tokens; {_ELSEWHERE}")
    return Calls(layers, heads, kv_heads, head_dim, window)


def calls_of(architecture: Architecture) -> Calls:
    """`attention_calls`, or about the same by the settings of a text model that can't be run packed."""
    try:
        if not architecture.is_encoder_decoder:
            return attention_calls(architecture)
    except CheckpointError:
        pass
    text = architecture.config.get_text_config()
    layers, heads = (int(getattr(text, name)) for name in ("num_hidden_layers", "num_attention_heads"))
    size = getattr(text, "head_dim", None) or getattr(text, "d_kv", None) or text.hidden_size // heads
    return Calls(layers, heads, int(getattr(text, "num_key_value_heads", None) or heads), int(size))
