"""What images are in prompts: the checkpoint's processor writes it for a size, its tokenizer says which tokens."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from pathlib import Path

from lookonce.core.errors import CheckpointError, LookonceError, invalid
from lookonce.models.chat.tokenizer import TOKENIZER, VOCABULARY, load_tokenizer
from lookonce.models.family import Grid, Marker
from lookonce.models.general.architecture import Architecture
from lookonce.models.general.processor import Processor

_SMALL = (150, 60)
"""Width and height."""
_REMEMBERED = 1024
"""Sizes of images."""


@dataclass(frozen=True)
class ImageText:
    """An image of one size in a prompt."""

    tokens: int  # rows of its embedding
    markers: tuple[Marker, ...]  # tokens among and around them
    grid: Grid | None  # its patches, where M-RoPE needs them

    @property
    def first(self) -> int:
        """Place of the first row among the image's tokens."""
        taken = {at for at, _ in self.markers}
        return next(at for at in range(len(taken) + 1) if at not in taken)


class ImageTexts:
    """Of one checkpoint directory. Safe to use from several threads."""

    def __init__(self, path: Path, architecture: Architecture) -> None:
        """Raises CheckpointError."""
        self.has_tokens = any((path / name).is_file() for name in (TOKENIZER, VOCABULARY))
        self.processor = Processor(path, architecture.config, tokenizer=self.has_tokens)
        self.image_token = self.processor.image_token  # which a template writes
        try:
            self.row_token = self.processor.row_token
            self.each_alone = self.processor.each_alone()
        except LookonceError as error:
            raise CheckpointError(
                f"{path}: its processor can't prepare images ({error.message}); copy preprocessor_config.json and "
                "processor_config.json from the model's repository"
            ) from error
        self.image_id = self._image_id(path, architecture) if self.has_tokens else -1
        self.placeholder_id, self.around = self.image_id, ("", "")
        if self.has_tokens:
            self.placeholder_id = self.processor.tokenizer.convert_tokens_to_ids(self.image_token)
            self.around = self._around()
        self._kept: dict[tuple[int, int], ImageText] = {}
        self._one = threading.Lock()

    def _image_id(self, path: Path, architecture: Architecture) -> int:
        number = getattr(architecture.config, "image_token_id", None)
        if number is None:
            number = getattr(architecture.config, "image_token_index", None)
        spelt = self.processor.tokenizer.convert_tokens_to_ids(self.row_token)
        if not isinstance(number, int) or spelt != number:
            raise CheckpointError(
                f"{path}: the processor's image token {self.row_token!r} is {spelt!r} in the tokenizer and "
                f"{number!r} in config.json: the general path serves models where they are one; take both from the "
                "same repository"
            )
        text = f"{self.image_token} what's on it? Zo\u00eb's 12\n{self.image_token}"
        tokenizer, own = load_tokenizer(path, r"\s*\S+|\s+"), self.processor.tokenizer
        begun = getattr(own, "add_bos_token", None) is not False  # PaliGemma's processor writes <s> itself
        ways = {True} if begun else {True, False}
        if not any(
            tokenizer.encode(text, add_special_tokens=x).ids == own(text, add_special_tokens=x).input_ids for x in ways
        ):
            raise CheckpointError(
                f"{path}: transformers reads the tokenizer's files otherwise than tokenizer.json says (a text has "
                "other tokens); save the tokenizer anew with transformers' save_pretrained"
            )
        return number

    def _around(self) -> tuple[str, str]:
        """The text before the first special token of an image, and behind the last."""
        text, _ = self.processor.text_of(*_SMALL)
        special = sorted(self.processor.tokenizer.get_added_vocab(), key=len, reverse=True)
        found = list(re.finditer("|".join(map(re.escape, special)) or "(?!)", text))
        return (text[: found[0].start()], text[found[-1].end() :]) if found else ("", "")

    def has(self, width: int, height: int) -> bool:
        """Whether `of` knows the answer."""
        return (width, height) in self._kept

    def of(self, width: int, height: int) -> ImageText:
        """An image of so many pixels. Where there is no tokenizer, its markers are left out."""
        found = self._kept.get((width, height))
        if found is not None:
            return found
        with self._one:  # transformers' tokenizers are for one thread at a time
            found = self._of(width, height)
            if len(self._kept) >= _REMEMBERED:
                self._kept.pop(next(iter(self._kept)), None)
            self._kept[width, height] = found
        return found

    def _of(self, width: int, height: int) -> ImageText:
        text, grid = self.processor.text_of(width, height)
        if not self.has_tokens:
            return ImageText(text.count(self.row_token), (), grid)
        before, behind = self.around
        if not (text.startswith(before) and text.endswith(behind)):
            raise invalid(
                f"image: this model's processor writes other text around an image of {width}x{height} pixels than "
                "around others, which is not served",
                param="image",
            )
        text = text[len(before) : len(text) - len(behind)]
        ids = self.processor.tokenizer.encode(text, add_special_tokens=False)
        markers = tuple((at, number) for at, number in enumerate(ids) if number != self.image_id)
        return ImageText(len(ids) - len(markers), markers, grid)
