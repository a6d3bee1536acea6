"""What images are in prompts: the checkpoint's processor writes it for a size, its tokenizer says which tokens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lookonce.core.errors import CheckpointError, LookonceError
from lookonce.models.chat.chat_format import ChatFormat, TemplateRefusal, Turn
from lookonce.models.chat.tokenizer import TOKENIZER, VOCABULARY
from lookonce.models.family import Grid, Marker
from lookonce.models.general.architecture import Architecture
from lookonce.models.general.processor import Processor, Size

_REMEMBERED = 1024
"""Sizes of images."""
_ONE, _OTHER = (150, 60), (60, 150)
"""Sizes of images that prompts are tried with."""
_TEXT = "what's on it? Zo\u00eb's 12"


@dataclass(frozen=True)
class Rows:
    """Rows of an image's embedding in a prompt."""

    tokens: int
    markers: tuple[Marker, ...]  # tokens among and around them

    @property
    def first(self) -> int:
        """Place of the first row among the image's tokens."""
        taken = {at for at, _ in self.markers}
        return next(at for at in range(len(taken) + 1) if at not in taken)


@dataclass(frozen=True)
class ImageText(Rows):
    """An image of one size in a prompt, as its only one."""

    grid: Grid | None  # its patches, where M-RoPE needs them
    among_others: Rows | None = None  # where a prompt has several, if that is another; their rows are behind these


class ImageTexts:
    """Of one checkpoint directory. Safe to use from several threads."""

    def __init__(self, path: Path, architecture: Architecture, chat: Callable[[str], ChatFormat | None]) -> None:
        """`chat`: how conversations are written, images by the text given; None where a file for it is missing. Raises
        CheckpointError where its prompts are not those of the processor."""
        self.has_tokens = any((path / name).is_file() for name in (TOKENIZER, VOCABULARY))
        self.processor = Processor(path, architecture.config, tokenizer=self.has_tokens)
        self.image_token = self.processor.image_token
        self.image_id, self.row_id = -1, self.processor.row_id
        self._text, self._plain = self.image_token, [self.image_id]
        self._kept: dict[Size, ImageText] = {}
        self._one = threading.Lock()
        self.takes_several = True
        """Whether several images of a prompt are written as is known here."""
        if self.has_tokens:
            self.image_id = self._id(path)
            self._plain = [self.image_id]
            found = chat(self.image_token)
            try:
                if found is not None:
                    self._check(path, found)
            except LookonceError as error:
                raise CheckpointError(
                    f"{path}: its processor refuses what its chat template writes for an image ({error.message}); "
                    "take both from the same repository"
                ) from error

    def _id(self, path: Path) -> int:
        number = self.processor.tokenizer.convert_tokens_to_ids(self.image_token)
        unknown = self.processor.tokenizer.unk_token_id
        if not isinstance(number, int) or (unknown is not None and number == unknown):
            raise CheckpointError(
                f"{path}: the processor's image token {self.image_token!r} is no token of the tokenizer; "
                "take both from the same repository"
            )
        return number

    def _check(self, path: Path, chat: ChatFormat) -> None:
        """Hold what is written here to what the processor writes for conversations."""
        alone, both = _rendered(chat, [None, _TEXT]), _rendered(chat, [None, None, _TEXT])
        apart = _rendered(chat, [None, _TEXT], [None, _TEXT])
        plain = [] if alone is None else self._encoded(path, chat, alone)
        if alone is None or plain.count(self.image_id) != 1:  # `prompt_problems` says so
            return
        if not self.processor.leads:
            self._text, self._plain = alone, plain
            self.of(*_ONE)
        if not self.of(*_OTHER).tokens:
            raise CheckpointError(
                f"{path}: the processor writes no token {self.row_id} for an image, which config.json has for its "
                "rows; take both from the same repository"
            )
        several = [text for text in (both, apart) if text is not None]
        self.takes_several = not self.processor.leads and all(self._agrees(path, chat, text) for text in several)

    def _encoded(self, path: Path, chat: ChatFormat, text: str) -> list[int]:
        """Ids of a text by transformers' tokenizer; held to those of the files alone."""
        ids: list[int] = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        stated = chat.tokenizer.encode_special_tokens
        chat.tokenizer.encode_special_tokens = False
        try:
            if chat.tokenizer.encode(text, add_special_tokens=False).ids != ids:
                raise CheckpointError(
                    f"{path}: transformers reads the tokenizer's files otherwise than tokenizer.json says (a text has "
                    "other tokens); save the tokenizer anew with transformers' save_pretrained"
                )
        finally:
            chat.tokenizer.encode_special_tokens = stated
        return ids

    def _agrees(self, path: Path, chat: ChatFormat, text: str) -> bool:
        """Whether two images of a conversation are written as each of them is here."""
        plain, sizes = self._encoded(path, chat, text), iter((_ONE, _OTHER))
        if plain.count(self.image_id) != 2:
            return False
        expected: list[int] = []
        for number in plain:
            if number != self.image_id:
                expected.append(number)
                continue
            image = self.of(*next(sizes))
            expected += _written(image.among_others or image, self.row_id)
        try:
            return self.processor.ids((_ONE, _OTHER), text)[0] == expected
        except LookonceError:
            return False

    def has(self, width: int, height: int) -> bool:
        """Whether `of` knows the answer."""
        return (width, height) in self._kept

    def of(self, width: int, height: int) -> ImageText:
        """An image of so many pixels. Where there is no tokenizer, its markers are left out."""
        found = self._kept.get((width, height))
        if found is not None:
            return found
        with self._one:  # transformers' tokenizers are for one thread at a time
            found = self._of((width, height))
            if len(self._kept) >= _REMEMBERED:
                self._kept.pop(next(iter(self._kept)), None)
            self._kept[width, height] = found
        return found

    def _of(self, size: Size) -> ImageText:
        ids, grid = self.processor.ids([size], self._text)
        alone = self._rows(self._between(ids))
        among = self._among_others(size) if self.processor.among_others else None
        return ImageText(alone.tokens, alone.markers, grid, among)

    def _among_others(self, size: Size) -> Rows:
        text = self.processor.text_among_others(size)
        if not self.has_tokens:
            return Rows(text.count(self.image_token), ())
        return self._rows(self.processor.tokenizer.encode(text, add_special_tokens=False))

    def _rows(self, ids: Sequence[int]) -> Rows:
        if not self.has_tokens:
            return Rows(ids.count(self.row_id), ())
        markers = tuple((at, number) for at, number in enumerate(ids) if number != self.row_id)
        return Rows(len(ids) - len(markers), markers)

    def _between(self, ids: list[int]) -> list[int]:
        """An image's own among those of the text that it is tried in. Raises CheckpointError."""
        if self.processor.leads or not self.has_tokens:
            return ids
        at = self._plain.index(self.image_id)
        before, after = self._plain[:at], self._plain[at + 1 :]
        end = len(ids) - len(after)
        if ids[:at] != before or ids[end:] != after or end < at:
            raise CheckpointError(
                f"{self.processor.label} writes more into a prompt than what an image is (its other tokens differ from "
                "the chat template's), which the general path doesn't; use vLLM or transformers for it"
            )
        return ids[at:end]


def _written(rows: Rows, row_id: int) -> list[int]:
    ids = [row_id] * (rows.tokens + len(rows.markers))
    for at, number in rows.markers:
        ids[at] = number
    return ids


def _rendered(chat: ChatFormat, *contents: list[str | None]) -> str | None:
    """A conversation of users' messages, each answered but the last; None: the template refuses it."""
    turns: list[Turn] = []
    for content in contents:
        turns += [Turn("assistant", (_TEXT,))] * bool(turns) + [Turn("user", tuple(content))]
    try:
        return chat.render(turns)
    except TemplateRefusal:
        return None
