"""The vision half: the checkpoint's processor, and `get_image_features` of its class without a language model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from lookonce.core.errors import CheckpointError, LookonceError
from lookonce.models.checkpoint.checkpoint import Checkpoint
from lookonce.models.checkpoint.weights import load_weights
from lookonce.models.family import Half, Patches
from lookonce.models.general.architecture import Architecture
from lookonce.models.general.family import bounded
from lookonce.models.general.joined import apart
from lookonce.models.general.processor import Processor
from lookonce.models.general.qformer import fold, folded_shape
from lookonce.models.omp_thread import Pause

_NO_PIXELS = np.zeros((0,), dtype=np.uint8)
_PATCH_NUMBERS = 3 * 16 * 16
"""Of a patch as a batch counts them: towers have patches of 14 or 16 pixels."""


@dataclass(frozen=True)
class Prepared(Patches):
    """An image as the checkpoint's image processor leaves it."""

    inputs: dict[str, Any] = field(default_factory=dict)
    among_others: tuple[dict[str, Any], int] | None = None  # the same as the first of several, and rows of it

    @property
    def count(self) -> int:
        """Number of patches, about."""
        numbers = [x.numel() for x in self.inputs.values() if torch.is_tensor(x) and x.is_floating_point()]
        return max(1, max(numbers, default=1) // _PATCH_NUMBERS)


class GeneralEncoder:
    """A `VisionEncoder`. `encode` is called from one thread at a time."""

    def __init__(
        self,
        model: Any,
        processor: Processor,
        dtype: torch.dtype,
        device: torch.device,
        folded: tuple[int, int] | None = None,
    ) -> None:
        """`folded`: shape of an embedding that holds the tower's own rows (see `qformer`)."""
        self._folded = folded
        self.model, self.dtype, self.device = model, dtype, device
        self._processor = processor
        self._names = frozenset(inspect.signature(type(model).get_image_features).parameters)
        if "kwargs" in self._names and hasattr(model, "model"):
            inner = inspect.signature(type(model.model).get_image_features).parameters
            self._names |= frozenset(inner)

    def prepare(self, image: Image.Image, min_pixels: int, max_pixels: int) -> Prepared:
        """An RGB image, resized to between the bounds where it is not, and given to the checkpoint's processor."""
        width, height = image.size
        columns, rows = bounded(width, height, min_pixels, max_pixels)
        if (columns, rows) != image.size:
            image = image.resize((columns, rows), resample=Image.Resampling.BICUBIC)
        among = self._processor.inputs_among_others(image) if self._processor.among_others else None
        taken = among and (self._taken(among[0]), among[1])
        return Prepared(
            _NO_PIXELS, (1, rows, columns), width, height, self._taken(self._processor.inputs(image)), taken
        )

    def _taken(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {name: x for name, x in inputs.items() if name in self._names}

    @torch.inference_mode()
    def encode(self, batch: Sequence[Patches], pause: Pause = lambda: None) -> list[torch.Tensor]:
        """Rows [tokens, hidden] of each image on the CPU. One image at a time: none is padded for another's sake."""
        rows = []
        for prepared in batch:
            if not isinstance(prepared, Prepared):
                raise TypeError(f"{type(prepared).__name__} was prepared by another encoder")
            found = self._one(prepared.inputs)
            if prepared.among_others is not None:
                inputs, count = prepared.among_others
                found = torch.cat([found, self._one(inputs)[:count]])
            rows.append(found.to("cpu"))
            pause()
        return rows

    def warm_up(self) -> None:
        """Encode one small image. Raises CheckpointError when it has other rows than it has tokens in a prompt."""
        image = Image.effect_noise((96, 64), 100).convert("RGB")
        try:
            (rows,) = self.encode([self.prepare(image, 1, 96 * 64)])
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            if isinstance(error, LookonceError):
                raise
            raise CheckpointError(
                f"{type(self.model).__name__} can't encode what its processor makes of an image "
                f"({type(error).__name__}); take config.json and preprocessor_config.json from the same repository"
            ) from error
        tokens = self._processor.rows_of(image)
        if len(rows) != tokens:
            raise CheckpointError(
                f"{type(self.model).__name__} encodes an image to {len(rows)} rows, its processor writes {tokens} "
                "tokens for it; take config.json and preprocessor_config.json from the same repository"
            )

    def _one(self, prepared: dict[str, Any]) -> torch.Tensor:
        inputs = {name: self._placed(x) for name, x in prepared.items()}
        if self._folded is not None:
            return fold(self.model.vision_model(**inputs).last_hidden_state[0], self._folded).to(self.dtype)
        features = self.model.get_image_features(**inputs, return_dict=True)
        deepstack = getattr(features, "deepstack_features", None)
        if deepstack is not None and len(deepstack):
            raise CheckpointError(f"{type(self.model).__name__} has deepstack features, which a record doesn't hold")
        found = features.pooler_output
        parts = [found] if torch.is_tensor(found) else list(found)
        return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]).to(self.dtype)

    def _placed(self, x: Any) -> Any:
        if not torch.is_tensor(x):
            return x
        return x.to(self.device, self.dtype) if x.is_floating_point() else x.to(self.device)


def load_encoder(
    architecture: Architecture, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
) -> GeneralEncoder:
    """Read the vision half. Raises CheckpointError."""
    model = architecture.hollow(dtype)
    for name in sorted(architecture.language, key=len):  # what a module holds goes with it
        parent, _, last = name.rpartition(".")
        owner = model.get_submodule(parent)
        if last in owner._parameters:
            del owner._parameters[last]
        elif last in owner._modules:
            owner._modules[last] = nn.Module()
    with apart(model, architecture.groups_in(Half.VISION)):
        load_weights(model, checkpoint, Half.VISION, dtype=dtype, device=device)
    model.to(device)
    processor = Processor(checkpoint.path, architecture.config, tokenizer=False)
    folded = folded_shape(architecture) if architecture.reads_text else None
    return GeneralEncoder(model, processor, dtype, device, folded)
