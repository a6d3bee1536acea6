"""What images are in prompts: the checkpoint's processor writes it for a size, its tokenizer says which tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lookonce.core.errors import CheckpointError
from lookonce.models.family import Marker
from lookonce.models.general.architecture import Architecture
from lookonce.models.general.processor import Processor

_REMEMBERED = 1024
"""Sizes of images."""


@dataclass(frozen=True)
class ImageText:
    """An image of one size in a prompt."""

    tokens: int  # rows of its embedding
    markers: tuple[Marker, ...]  # tokens among and around them


class ImageTexts:
    """Of one checkpoint directory. Safe to use from several threads."""

    def __init__(self, path: Path, architecture: Architecture) -> None:
        """Raises CheckpointError."""
        self.processor = Processor(path, architecture.config.model_type, tokenizer=True)
        self.image_token = self.processor.image_token
        number = getattr(architecture.config, "image_token_id", None)
        if number is None:
            number = getattr(architecture.config, "image_token_index", None)
        spelt = self.processor.tokenizer.convert_tokens_to_ids(self.image_token)
        if not isinstance(number, int) or spelt != number:
            raise CheckpointError(
                f"{path}: the processor's image token {self.image_token!r} is {spelt!r} in the tokenizer and "
                f"{number!r} in config.json; take both from the same repository"
            )
        self.image_id = number
        self.each_alone = self.processor.each_alone()
        self.of = lru_cache(maxsize=_REMEMBERED)(self._of)

    def _of(self, width: int, height: int) -> ImageText:
        ids = self.processor.tokenizer.encode(self.processor.text_of(width, height), add_special_tokens=False)
        markers = tuple((at, number) for at, number in enumerate(ids) if number != self.image_id)
        return ImageText(len(ids) - len(markers), markers)
