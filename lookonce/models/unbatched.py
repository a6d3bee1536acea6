"""What the plain engine asks of a model: one prompt at a time, by the model's own way of generating.

For models that can't be run packed (see `text_adapter` for those that can). The engine never sees modules or caches; a
model never sees requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from lookonce.models.family import Grid
from lookonce.models.text_adapter import ModelShape

Choose = Callable[[torch.Tensor], tuple[int, bool]]
"""Logits [vocabulary] -> the next token, and whether it is the last that is wanted."""


@dataclass(frozen=True)
class ImageRows:
    """An image of a prompt."""

    grid: Grid
    rows: torch.Tensor  # [tokens, width of an embedding], on the model's device and in its dtype; not to be written to


@dataclass(frozen=True)
class UnbatchedPrompt:
    """A prompt with its placeholders expanded."""

    token_ids: Sequence[int]
    images: Sequence[ImageRows]  # in order
    text: str = ""  # without images, for a model that reads it beside an image's rows


class UnbatchedModel(Protocol):
    """A language model over one sequence. Called from one thread at a time."""

    @property
    def shape(self) -> ModelShape:
        """Its dimensions."""

    def check(self, prompt: UnbatchedPrompt) -> None:
        """Raise INVALID_ARGUMENT for a prompt that it can't be given. Rows need not be there yet."""

    def begin(self, prompt: UnbatchedPrompt) -> Any:
        """What depends on the prompt alone, computed once for all its answers and choices; an engine drops it."""

    def generate(self, begun: Any, choose: Choose) -> None:
        """Feed the prompt and then each token that is chosen, until one is the last. Keeps nothing of it."""
