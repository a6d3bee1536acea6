"""What of a class the general path can't compute, found without weights: by names, and by one pass on the meta device.

The pass runs the text model with an `Attend` that records who calls it, and records the states of layers that keep
one instead of keys and values; a window, a soft cap or a sink comes with the call. Who sees whom is read off the masks
that the class makes.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from transformers.models.auto import image_processing_auto

from lookonce.core.errors import CheckpointError
from lookonce.models.general.architecture import Architecture
from lookonce.models.general.attention import NAME, Limits, Unpacked, attending
from lookonce.models.general.blocks import UnknownMask, blocks_of_class
from lookonce.models.general.positions import position_rows
from lookonce.models.general.recurrent import STATES, RecordedState, intercept, recording
from lookonce.models.text_adapter import AttentionRules

_images: Any = image_processing_auto
_TOKENS = 3  # of the pass
_ATTENTION = "attention"
_BY_TYPES = ("token_type_ids", "mm_token_type_ids")
_READS_TEXT = ("input_ids", "qformer_input_ids")
_ELSEWHERE = "use vLLM or transformers for it"


@dataclass(frozen=True)
class Calls:
    """How the text model calls attention: the same in every layer that does. What the others keep."""

    attending: tuple[int, ...]  # layers that keep keys and values
    heads: int
    kv_heads: int
    head_dim: int
    rules: AttentionRules | None = None
    states: tuple[RecordedState, ...] = ()  # of the layers between them, in order
    all_layers: int = 0  # with those

    @property
    def attends_last(self) -> bool:
        """Whether the last layer keeps keys and values."""
        return self.attending[-1] == self.all_layers - 1

    @property
    def layers(self) -> int:
        """How many keep keys and values."""
        return len(self.attending)


class _Recorder:
    """An `Attend` that answers nothing."""

    calls = None

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, int, int]] = []
        self.states: list[RecordedState] = []
        self.calls_of: list[list[str]] = []  # of each layer: what it calls

    def begin(self, *_: Any) -> None:
        """A layer begins."""
        self.calls_of.append([])

    def keep(self, function: str, state: RecordedState) -> None:
        """A function of this name would keep a state."""
        self.calls_of[-1].append(function)
        self.states.append(state)

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.seen.append((layer, q.shape[1], k.shape[1], q.shape[2]))
        self.calls_of[-1].append(_ATTENTION)
        return q.flatten(1)


def class_problems(architecture: Architecture) -> Iterator[str]:
    """Why no engine serves the class, one sentence each."""
    cls = architecture.cls
    subject = f"config.json: {cls.__name__} is not served by the general path"
    if "mm_encoder_outputs" not in inspect.signature(cls.forward).parameters or not hasattr(cls, "get_image_features"):
        yield f"{subject}: it takes no image features computed elsewhere; {_ELSEWHERE}"
        return
    named = [name for name in inspect.signature(cls.get_image_features).parameters if name in _READS_TEXT]
    if named and not architecture.reads_text:
        yield f"{subject}: its vision half reads the question ({named[0]}); {_ELSEWHERE}"
    forwards = (cls.forward, type(architecture.model.base_model).forward)
    taken = [name for forward in forwards for name in inspect.signature(forward).parameters]
    told = [name for name in taken if name.endswith("token_type_ids") and name not in _BY_TYPES]
    if told:
        yield f"{subject}: its layers compute an image's tokens otherwise than text ({told[0]}); {_ELSEWHERE}"
        return
    if hasattr(architecture.model.base_model, "get_rope_index") and position_rows(architecture.model) == 1:
        yield f"{subject}: its positions depend on more than an image's grid (get_rope_index); {_ELSEWHERE}"
        return
    if getattr(getattr(architecture.config, "vision_config", None), "deepstack_visual_indexes", None):
        yield f"{subject}: its vision half has deepstack features; {_ELSEWHERE}"
    try:
        _ = architecture.language
    except CheckpointError as error:
        yield from error.problems
        return
    backends = _images.IMAGE_PROCESSOR_MAPPING_NAMES.get(architecture.config.model_type, {"pil": ""})
    if "pil" not in backends and find_spec("torchvision") is None:
        yield (
            f"{subject}: transformers has its image processor for torchvision only, which is not installed; install "
            "the torchvision that belongs to this torch"
        )


@lru_cache(maxsize=8)
def unpacked(architecture: Architecture) -> str | None:
    """Why the packed engine can't run a class that has no problems, a clause after its name; None: it can. The plain
    engine serves such a class."""
    if architecture.is_encoder_decoder:
        return "its language model is an encoder and a decoder"
    if architecture.reads_text:
        return "its Q-Former reads the question"
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
    recorder, limits = _Recorder(), Limits()
    intercept(model.layers)
    hooks = [layer.register_forward_pre_hook(recorder.begin) for layer in model.layers]
    try:
        model.set_attn_implementation(NAME)
        if model._can_set_experts_implementation():
            model.set_experts_implementation("batched_mm")  # reads no values
        width = model.embed_tokens.weight.shape[1]
        with (
            torch.inference_mode(),
            torch.device("meta"),
            attending(recorder, limits),
            recording(recorder.keep),
        ):
            hidden = torch.empty(1, _TOKENS, width, dtype=model.embed_tokens.weight.dtype)
            places = torch.arange(_TOKENS)[None]
            mask = torch.ones(1, _TOKENS, dtype=torch.int64, device="cpu")  # of which some models read the values
            out = model(inputs_embeds=hidden, attention_mask=mask, position_ids=places, use_cache=False)
    except Unpacked as error:
        raise CheckpointError(f"{subject}: its attention has {error}; {_ELSEWHERE}") from None
    except Exception as error:
        raise CheckpointError(
            f"{subject}: its text model can't be run packed ({type(error).__name__}); {_ELSEWHERE}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    kinds = getattr(model.config, "layer_types", None) or [""] * len(model.layers)
    shapes = {seen[1:] for seen in recorder.seen}
    expected = [list(STATES.get(kind, (_ATTENTION,))) for kind in kinds]
    attend = tuple(number for number, calls in enumerate(expected) if calls == [_ATTENTION])
    if recorder.calls_of != expected or tuple(seen[0] for seen in recorder.seen) != attend or len(shapes) != 1:
        raise CheckpointError(
            f"{subject}: not every layer attends once over keys and values of one size, or keeps a state that is known "
            f"here (short convolutions, gated delta rules); {_ELSEWHERE}"
        )
    if tuple(out.last_hidden_state.shape) != (1, _TOKENS, width):
        raise CheckpointError(f"{subject}: its text model answers rows of another width; {_ELSEWHERE}")
    heads, kv_heads, head_dim = shapes.pop()
    if heads % kv_heads:
        raise CheckpointError(f"{subject}: {heads} heads are no multiple of {kv_heads} key-value heads; {_ELSEWHERE}")
    rules = _rules(architecture, limits, subject)
    return Calls(attend, heads, kv_heads, head_dim, rules, tuple(recorder.states), len(kinds))


def _rules(architecture: Architecture, limits: Limits, subject: str) -> AttentionRules | None:
    """None for plain causal attention. Raises CheckpointError."""
    text = architecture.config.get_text_config()
    kinds = [kind for kind in getattr(text, "layer_types", None) or [None] * len(limits) if kind not in STATES]
    stated = getattr(text, "sliding_window", None)
    for kind, (window, *_) in zip(kinds, limits.values(), strict=False):
        odd = kind not in (None, "full_attention", "sliding_attention") or (kind == "sliding_attention") > bool(window)
        if odd or window not in (None, stated):
            raise CheckpointError(f"{subject}: a layer of {kind} has a window of {window}; {_ELSEWHERE}")
    context = getattr(text, "max_position_embeddings", None) or math.inf
    windows = tuple(window if window and window < context else None for window, *_ in limits.values())
    softcaps = {softcap for _, softcap, _ in limits.values()}
    if len(softcaps) > 1:
        raise CheckpointError(f"{subject}: its layers have several soft caps; {_ELSEWHERE}")
    try:
        both_ways, within_window = blocks_of_class(architecture)
    except UnknownMask as error:
        raise CheckpointError(f"{subject}: {error}; {_ELSEWHERE}") from error
    if both_ways is None and not all(causal for *_, causal in limits.values()):
        raise CheckpointError(f"{subject}: its attention has attention both ways; {_ELSEWHERE}")
    (softcap,) = softcaps
    if both_ways is None and softcap is None and not any(windows):
        return None
    return AttentionRules(windows, both_ways, within_window, softcap)


def calls_of(architecture: Architecture) -> Calls:
    """`attention_calls`, or about the same by the settings of a text model that can't be run packed."""
    if unpacked(architecture) is None:
        return attention_calls(architecture)
    text = architecture.config.get_text_config()
    layers, heads = (int(getattr(text, name)) for name in ("num_hidden_layers", "num_attention_heads"))
    size = getattr(text, "head_dim", None) or getattr(text, "d_kv", None) or text.hidden_size // heads
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    return Calls(tuple(range(layers)), heads, kv_heads, int(size))
