"""A checkpoint's class on the meta device: which of its tensors each half holds, and how its decoder calls attention.

Nothing is read and nothing computed here: parameters on the meta device have a name and a shape only.
"""

from __future__ import annotations

import inspect
import math
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from lookonce.core.errors import CheckpointError
from lookonce.models.family import Half
from lookonce.models.general.joined import Group, groups_of, in_parts

_TOWER, _QUERYING = "vision_model", ("query_tokens", "qformer", "language_projection")
_building = threading.Lock()


@dataclass(frozen=True)
class Place:
    """Where a tensor of the class lies."""

    half: Half
    name: str  # in the half: "model.layers.0...", "lm_head.weight"; the class's own name in the vision half
    shape: tuple[int, ...]


class Architecture:
    """One config.json's class. Raises CheckpointError for what transformers can't build of it."""

    def __init__(self, config: dict[str, Any], *, in_parts: bool = False) -> None:
        """`in_parts`: the files hold apart what the class has joined."""
        self.raw, self.in_parts = config, in_parts
        self.config = parsed(config)
        self.cls: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(self.config)]

    @cached_property
    def model(self) -> Any:
        """The whole class on the meta device."""
        with torch.device("meta"):
            return self._built()

    def hollow(self, dtype: torch.dtype) -> Any:
        """The whole class in evaluation mode with parameters on the meta device and buffers as they are computed with,
        to be filled half by half."""
        with _parameters_on_meta():
            model = self._built()
        for config in (model.config, *(module.config for module in model.modules() if hasattr(module, "config"))):
            config.dtype = dtype
        return model.eval()

    def _built(self) -> Any:
        try:
            return self.cls(parsed(self.raw))
        except ImportError as error:
            raise CheckpointError(
                f"config.json: transformers' {self.cls.__name__} wants a package that is not installed "
                f"({' '.join(str(error).split())[:120]}); the general path does not serve it"
            ) from None
        except (ValueError, TypeError, KeyError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:
            raise CheckpointError(
                f"config.json: transformers' {self.cls.__name__} can't be built of it ({type(error).__name__}); "
                "take config.json from the model's repository"
            ) from error

    @cached_property
    def decoder_name(self) -> str:
        """The text model's module in the class: it has `embed_tokens` and `layers`."""
        return decoder_name(self.model)

    @cached_property
    def head_name(self) -> str:
        """The output head's module in the class."""
        return module_name(self.model, self.model.get_output_embeddings())

    @cached_property
    def is_encoder_decoder(self) -> bool:
        """Whether the language model is an encoder and a decoder."""
        return bool(self.config.is_encoder_decoder or self.config.get_text_config().is_encoder_decoder)

    @cached_property
    def reads_text(self) -> bool:
        """Whether a Q-Former reads the question beside an image's rows, which are then its tower's own: with the
        question's text it belongs to the language half (InstructBLIP, arXiv:2305.06500)."""
        parameters = inspect.signature(getattr(self.cls, "get_image_features", self.cls.forward)).parameters
        return "qformer_input_ids" in parameters and all(hasattr(self.model, name) for name in (_TOWER, *_QUERYING))

    @cached_property
    def language(self) -> dict[str, str]:
        """What the language half holds: modules and parameters of the class, and their names in the half; of two that
        a tensor lies in, the first. Raises CheckpointError."""
        further = {name: name for name in _QUERYING} if self.reads_text else {}
        if not self.is_encoder_decoder:
            return {self.decoder_name: "model", self.head_name: "lm_head"} | further
        owner = self.head_name.rpartition(".")[0]
        embedding = module_name(self.model, self.model.get_input_embeddings())
        if not owner or not embedding.startswith(f"{owner}."):
            raise CheckpointError(
                f"config.json: {self.cls.__name__} is not served by the general path: its encoder and decoder are not "
                "one module; use vLLM or transformers for it"
            )
        return {embedding: "model.embed_tokens", self.head_name: "lm_head", owner: "model"} | further

    @cached_property
    def places(self) -> dict[str, Place]:
        """Every tensor of the class by its name there; of an encoder and a decoder that share an embedding, once."""
        shared = set(self.model.all_tied_weights_keys or ()) if self.is_encoder_decoder else set()
        shared.discard(f"{self.head_name}.weight")
        state = self._meta_state.items()
        return {name: self._place(name, tuple(x.shape)) for name, x in state if name not in shared}

    def _place(self, name: str, shape: tuple[int, ...]) -> Place:
        for owned, called in self.language.items():
            if f"{name}.".startswith(f"{owned}."):
                return Place(Half.LANGUAGE, called + name[len(owned) :], shape)
        return Place(Half.VISION, name, shape)

    @cached_property
    def tied(self) -> bool:
        """Whether the head shares the embedding's weight."""
        return f"{self.head_name}.weight" in (self.model.all_tied_weights_keys or {})

    @cached_property
    def _conversions(self) -> tuple[list[Any], list[Any]]:
        found = get_model_conversion_mapping(self.model)
        joins = [each for each in found if isinstance(each, WeightConverter)]
        return [each for each in found if not isinstance(each, WeightConverter)], joins

    def locate(self, stored: str) -> Place | None:
        """The place of a stored tensor; None for a buffer that older files hold, and for what the class leaves out.
        Raises CheckpointError for others."""
        if any(re.match(pattern, stored) for pattern in self.cls._keys_to_ignore_on_load_unexpected or ()):
            return None
        renamings, joins = self._conversions
        name, joined = rename_source_key(
            stored, renamings, [] if self.in_parts else joins, self.model.base_model_prefix, self._meta_state
        )
        if joined is not None:
            raise CheckpointError(
                f"tensor {stored!r} is stored in parts beside others that are stored joined; save the model anew with "
                "transformers' save_pretrained"
            )
        place = self.places.get(name)
        if place is None and name not in self._meta_state and name not in self._buffers and not self._is_ignored(name):
            raise CheckpointError(f"tensor {stored!r} belongs to no part of {self.cls.__name__}")
        return place

    @cached_property
    def _meta_state(self) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = self.model.state_dict()
        return in_parts(self.groups, state) if self.in_parts else state

    @cached_property
    def groups(self) -> list[Group]:
        """What is joined of parts; none where the files hold it joined."""
        return groups_of(self.model, self._conversions[1], self.model.state_dict()) if self.in_parts else []

    def groups_in(self, half: Half) -> list[Group]:
        """Those of one half."""
        return [group for group in self.groups if self._place(group.joined[0], ()).half is half]

    def is_part(self, stored: str) -> bool:
        """Whether a stored tensor is one that transformers joins with others."""
        renamings, joins = self._conversions
        return bool(joins) and rename_source_key(stored, renamings, joins)[1] is not None

    @cached_property
    def _buffers(self) -> frozenset[str]:
        """Those that no file need hold."""
        return frozenset(name for name, _ in self.model.named_buffers())

    def _is_ignored(self, name: str) -> bool:
        return name.endswith(("rotary_emb.inv_freq", ".position_ids", ".masked_bias", "attn.bias"))


def parsed(config: dict[str, Any]) -> PreTrainedConfig:
    """config.json as transformers reads it. Raises CheckpointError."""
    try:
        found: PreTrainedConfig = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    except Exception as error:
        raise CheckpointError(
            "config.json: transformers can't read its settings; take config.json from the model's repository"
        ) from error
    return found


def decoder_name(model: Any) -> str:
    """The module that has `embed_tokens` and `layers`. Raises CheckpointError."""
    module = model
    for _ in range(4):
        module = module.get_decoder()
        if isinstance(getattr(module, "layers", None), nn.ModuleList) and hasattr(module, "embed_tokens"):
            return module_name(model, module)
    raise CheckpointError(
        f"config.json: the text model of {type(model).__name__} is no stack of decoder layers; "
        "the general path does not serve it: use vLLM or transformers for it"
    )


def module_name(model: nn.Module, wanted: nn.Module | None) -> str:
    """A module's name within another. Raises CheckpointError when it isn't there."""
    for name, module in model.named_modules():
        if module is wanted and name:
            return str(name)
    raise CheckpointError(
        f"config.json: {type(model).__name__} has no output head of its own; the general path does not serve it"
    )


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters registered meanwhile lie on the meta device; buffers are computed as always."""
    register = nn.Module.register_parameter

    def register_hollow(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        hollow = None if parameter is None else nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, hollow)

    with _building:
        nn.Module.register_parameter = register_hollow  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]


def parameters(shapes: dict[str, tuple[int, ...]]) -> int:
    """How many numbers."""
    return sum(math.prod(shape) for shape in shapes.values())
