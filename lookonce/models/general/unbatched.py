"""The language half as an `UnbatchedModel`: transformers' class generates, given the rows of images in place of its
vision half.

What can't be run packed is run here as transformers runs it: recurrent state, soft caps, attention that depends on
which tokens are an image's, an encoder and a decoder. The class makes its own cache, masks and positions.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from lookonce.models.checkpoint.checkpoint import Checkpoint
from lookonce.models.checkpoint.weights import load_weights
from lookonce.models.family import Dimensions, Grid, Half
from lookonce.models.general.architecture import Architecture
from lookonce.models.general.blocks import TYPES, UnknownMask, blocks_of_class
from lookonce.models.general.joined import apart
from lookonce.models.general.positions import position_rows
from lookonce.models.general.qformer import QuestionReader, StoredRows
from lookonce.models.text_adapter import BothWays, ModelShape, Stage
from lookonce.models.unbatched import Choose, UnbatchedPrompt

GridOf = Callable[[Grid], Grid | None]
"""Patches of an image by its size, where the class counts them."""
FORMS: tuple[Callable[[Sequence[torch.Tensor]], Any], ...] = (
    list,
    lambda rows: torch.cat(list(rows))[None],
    lambda rows: torch.cat(list(rows)),
)
"""How classes take the rows of images: one of these each."""


class ImageFeatures:
    """What a vision half answers, of which nothing is there but the rows."""

    def __init__(self, pooler_output: Any) -> None:
        self.pooler_output = pooler_output

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _Chosen(LogitsProcessor):
    """Has each token chosen elsewhere."""

    def __init__(self, choose: Choose) -> None:
        self._choose, self.over = choose, False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """[1, vocabulary] -> the same with nothing left but the token chosen."""
        token, self.over = self._choose(scores[0])
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([token], device=scores.device), 0.0)


class _Over(StoppingCriteria):
    """Ends when the last token was chosen."""

    def __init__(self, chosen: _Chosen) -> None:
        self._chosen = chosen

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self._chosen.over, device=input_ids.device)


class GeneralUnbatched:
    """An `UnbatchedModel` over a class whose vision half has no weights. Called from one thread at a time."""

    def __init__(
        self,
        model: Any,
        shape: ModelShape,
        image_id: int,
        grid_of: GridOf,
        *,
        alike: bool = False,
        reader: QuestionReader | None = None,
    ) -> None:
        """`model` is filled; `image_id` stands for an image's rows in a prompt. `alike`: all tokens of a prompt are of
        one kind; `reader`: its Q-Former's, if that reads the question."""
        self._model, self._shape, self._image_id, self._grid_of = model, shape, image_id, grid_of
        self._reader = reader
        # BLIP-2 and its like embed images themselves, and have their language model generate
        self._embeds = "pixel_values" in inspect.signature(type(model).generate).parameters
        self._generator: Any = model.language_model if self._embeds else model
        inner = inspect.signature(type(model.base_model).forward).parameters
        takes = {*inspect.signature(type(model).forward).parameters, *inner}
        self._types, self._alike = [name for name in TYPES if name in takes], alike
        self._counts_patches = "image_grid_thw" in takes
        self.form: Callable[[Sequence[torch.Tensor]], Any] = FORMS[0]
        own = self._generator.generation_config
        start = getattr(own, "decoder_start_token_id", None)
        start = own.bos_token_id if start is None else start
        for each in (model, self._generator):
            each.generation_config = _settings(use_cache=True)
        self._settings = {"do_sample": False, "max_new_tokens": shape.context, "pad_token_id": 0}
        if self._generator.config.is_encoder_decoder:
            self._settings["decoder_start_token_id"] = start

    @property
    def shape(self) -> ModelShape:
        """The model's dimensions."""
        return self._shape

    @property
    def cls(self) -> Any:
        """The class's object."""
        return self._model

    @property
    def needs_whole_images(self) -> bool:
        """Whether an image has all of its rows or none."""
        return self._reader is not None

    @property
    def spread(self) -> float:
        """Standard deviation of the embedding of a token."""
        embedding = self._generator.get_input_embeddings()
        return float(embedding(torch.zeros(1, dtype=torch.int64, device=self._shape.device)).float().std()) or 1.0

    def check(self, prompt: UnbatchedPrompt) -> None:
        """See `UnbatchedModel.check`."""
        if self._reader is not None:
            self._reader.ids(prompt.text)

    @torch.inference_mode()
    def begin(self, prompt: UnbatchedPrompt) -> dict[str, Any]:
        """See `UnbatchedModel.begin`: what the class's `generate` is given."""
        ids = torch.tensor([prompt.token_ids], device=self._shape.device)
        rows = self._rows(prompt)
        return self._embedded(ids, rows) if self._embeds else self._inputs(ids, rows, prompt)

    @torch.inference_mode()
    def whole(self, prompt: UnbatchedPrompt, answer: Sequence[int]) -> torch.Tensor:
        """Logits [1 + answer, vocabulary] behind the prompt and each token of an answer, by the class's own forward
        over all of it, without a cache."""
        decoded = self._generator.config.is_encoder_decoder
        ids = [*prompt.token_ids, *(() if decoded else answer)]
        inputs = self._inputs(torch.tensor([ids], device=self._shape.device), self._rows(prompt), prompt)
        if decoded:
            start = [self._settings["decoder_start_token_id"], *answer]
            inputs["decoder_input_ids"] = torch.tensor([start], device=self._shape.device)
        if self._embeds:
            inputs["pixel_values"] = None
        if self._reader is not None:
            inputs["qformer_input_ids"] = None
        logits: torch.Tensor = self._model(**inputs, use_cache=False).logits[0, -1 - len(answer) :]
        return logits

    def _rows(self, prompt: UnbatchedPrompt) -> list[torch.Tensor]:
        """Of each image, for the language model."""
        rows = [image.rows for image in prompt.images]
        return [self._reader.read(self._model, each, prompt.text) for each in rows] if self._reader else rows

    def _inputs(self, ids: torch.Tensor, rows: Sequence[torch.Tensor], prompt: UnbatchedPrompt) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        kinds = torch.zeros_like(ids) if self._alike else (ids == self._image_id).long()
        inputs |= dict.fromkeys(self._types, kinds)
        grids = [grid for image in prompt.images if (grid := self._grid_of(image.grid)) is not None]
        if grids and self._counts_patches:
            inputs["image_grid_thw"] = torch.tensor(grids, device=ids.device)
        if rows:
            inputs["mm_encoder_outputs"] = {"image": ImageFeatures(self.form(rows))}
        return inputs

    @torch.inference_mode()
    def generate(self, begun: dict[str, Any], choose: Choose) -> None:
        """See `UnbatchedModel.generate`."""
        chosen = _Chosen(choose)
        inputs = dict(begun)
        if "mm_encoder_outputs" in inputs:
            inputs["mm_encoder_outputs"] = dict(inputs["mm_encoder_outputs"])
        self._generator.generate(
            **inputs,
            generation_config=_settings(**self._settings),
            logits_processor=[chosen],
            stopping_criteria=[_Over(chosen)],
        )

    def _embedded(self, ids: torch.Tensor, rows: Sequence[torch.Tensor]) -> dict[str, Any]:
        """Inputs of a language model that takes the embedded prompt; of an encoder and a decoder, what the first makes
        of it."""
        hidden, everything = self._generator.get_input_embeddings()(ids), torch.ones_like(ids)
        if rows:
            hidden[ids == self._image_id] = torch.cat(list(rows)).to(hidden.dtype)
        if not self._generator.config.is_encoder_decoder:
            return {"inputs_embeds": hidden, "input_ids": ids, "attention_mask": everything}
        encoded = self._generator.get_encoder()(inputs_embeds=hidden, attention_mask=everything, return_dict=True)
        return {"encoder_outputs": encoded, "attention_mask": everything}


def load_unbatched(
    architecture: Architecture,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    *,
    dimensions: Dimensions,
    context: int,
    image_id: int,
    grid_of: GridOf,
) -> GeneralUnbatched:
    """Read the language half. Raises CheckpointError."""
    model = architecture.hollow(dtype)
    reader = None
    if architecture.reads_text:
        model.vision_model, reader = StoredRows(), QuestionReader(checkpoint.path, architecture)
    _fill(model, architecture, checkpoint, dtype, device)
    model.to(device)
    shape = ModelShape(
        layers=dimensions.layers,
        heads=dimensions.heads,
        kv_heads=dimensions.kv_heads,
        head_dim=dimensions.head_dim,
        hidden=checkpoint.hidden_size,
        vocabulary=int(architecture.model.get_output_embeddings().weight.shape[0]),
        context=context,
        dtype=dtype,
        stages=(Stage(device, dimensions.layers),),
        position_rows=position_rows(architecture.model),
    )
    return GeneralUnbatched(model, shape, image_id, grid_of, alike=_alike(architecture), reader=reader)


def _alike(architecture: Architecture) -> bool:
    """Whether a prompt's tokens all see one another, whatever their kind (PaliGemma)."""
    with contextlib.suppress(UnknownMask):
        return blocks_of_class(architecture)[0] is BothWays.PROMPT
    return False


def _fill(
    model: Any, architecture: Architecture, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
) -> None:
    """Give the class its language half's tensors, and take away its hollow others."""
    places = {name: place for name, place in architecture.places.items() if place.half is Half.LANGUAGE}
    half = nn.Module()
    for place in places.values():
        hollow = torch.empty(place.shape, dtype=dtype, device="meta")
        _put(half, place.name, nn.Parameter(hollow, requires_grad=False))
    with apart(model, architecture.groups_in(Half.LANGUAGE)):
        load_weights(half, checkpoint, Half.LANGUAGE, dtype=dtype, device=device)
        for name, place in places.items():
            _put(model, name, half.get_parameter(place.name))
    for name, source in (model.all_tied_weights_keys or {}).items():
        if architecture.is_encoder_decoder and name not in places and source in places:
            _put(model, name, model.get_parameter(source))
    for module in model.modules():  # classes ask their first parameter for a device
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                module._parameters[name] = None


def _settings(**values: Any) -> GenerationConfig:
    make: Any = GenerationConfig
    found: GenerationConfig = make(**values)
    return found


def _put(root: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Set a tensor by its name; modules on the way are made where there are none."""
    *path, last = name.split(".")
    owner = root
    for each in path:
        if each not in owner._modules:
            owner.add_module(each, nn.Module())
        owner = owner.get_submodule(each)
    if last in owner._buffers:
        owner._buffers[last] = parameter.data
    else:
        owner._parameters[last] = parameter
