"""What images are in prompts: the checkpoint's processor writes it for a size, its tokenizer says which tokens."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lookonce.core.errors import CheckpointError, LookonceError, invalid
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
        """`chat`: how conversations are written, images by the text given; None where no file of the checkpoint says
        so. Raises CheckpointError where its prompts are not those of the processor."""
        self.has_tokens = any((path / name).is_file() for name in (TOKENIZER, VOCABULARY))
        self.processor = Processor(path, architecture.config, tokenizer=self.has_tokens)
        self.image_token = self.processor.image_token  # which a template writes
        self.image_id, self.placeholder_id, self.around = self.processor.row_id, -1, ("", "")
        self.takes_several = not self.processor.leads
        """Whether several images of a prompt are written as is known here."""
        self._text: str | None = None  # a conversation of the template
        self._plain: list[int] = []  # its tokens
        self._kept: dict[Size, ImageText] = {}
        self._one = threading.Lock()
        if not self.has_tokens:
            return
        self.placeholder_id = self._id(path)
        self.around = self._around()
        found = chat(self.image_token)
        try:
            if found is not None:
                self._check(path, found)
        except LookonceError as error:
            raise CheckpointError(
                f"{path}: its processor refuses what its chat template writes for an image ({error.message}); "
                "take both from the same repository"
            ) from error
        if not self.of(*_OTHER).tokens:
            raise CheckpointError(
                f"{path}: the processor writes no token {self.image_id} for an image, which config.json has for its "
                "rows; take both from the same repository"
            )

    def _id(self, path: Path) -> int:
        number = self.processor.tokenizer.convert_tokens_to_ids(self.image_token)
        unknown = self.processor.tokenizer.unk_token_id
        if not isinstance(number, int) or (unknown is not None and number == unknown):
            raise CheckpointError(
                f"{path}: the processor's image token {self.image_token!r} is no token of the tokenizer; "
                "take both from the same repository"
            )
        return number

    def _around(self) -> tuple[str, str]:
        """The text before the first special token of an image, and behind the last."""
        text = self.processor.text_of(_ONE)[0]
        added = self.processor.tokenizer.added_tokens_decoder.values()
        special = sorted((token.content for token in added if token.special), key=len, reverse=True)
        found = list(re.finditer("|".join(map(re.escape, special)) or "(?!)", text))
        return (text[: found[0].start()], text[found[-1].end() :]) if found else ("", "")

    def _check(self, path: Path, chat: ChatFormat) -> None:
        """Hold what is written here to what the processor writes for conversations."""
        alone, both = _rendered(chat, [None, _TEXT]), _rendered(chat, [None, None, _TEXT])
        apart = _rendered(chat, [None, _TEXT], [None, _TEXT])
        plain = [] if alone is None else self._encoded(path, chat, alone)
        if alone is None or plain.count(self.placeholder_id) != 1:  # `prompt_problems` says so
            return
        self._text, self._plain = alone, plain
        self.of(*_ONE)
        several = [text for text in (both, apart) if text is not None]
        self.takes_several = all(self._agrees(path, chat, text) for text in several)

    def _encoded(self, path: Path, chat: ChatFormat, text: str) -> list[int]:
        """Ids of a text, as it is with text around images, by transformers' tokenizer; held to those of the files."""
        text = text.replace(self.image_token, self.image_token.join(self.around))
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
        if plain.count(self.placeholder_id) != 2:
            return False
        expected: list[int] = []
        for number in plain:
            if number != self.placeholder_id:
                expected.append(number)
                continue
            image = self.of(*next(sizes))
            expected += _written(image.among_others or image, self.image_id)
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
        if self._text is None:
            text, grid = self.processor.text_of(size)
            alone = self._spelt(text)
        else:
            ids, grid = self.processor.ids([size], self._text)
            alone = self._rows(self._between(ids))
        among = self._spelt(self.processor.text_among_others(size)) if self.processor.among_others else None
        return ImageText(alone.tokens, alone.markers, grid, among)

    def _spelt(self, text: str) -> Rows:
        if not self.has_tokens:
            return Rows(self.processor.rows_in(text), ())
        before, behind = self.around
        if not (text.startswith(before) and text.endswith(behind)):
            raise invalid(
                "image: this model's processor writes other text around an image of this size than around others, "
                "which is not served",
                param="image",
            )
        inner = text[len(before) : len(text) - len(behind)]
        return self._rows(self.processor.tokenizer.encode(inner, add_special_tokens=False))

    def _rows(self, ids: Sequence[int]) -> Rows:
        markers = tuple((at, number) for at, number in enumerate(ids) if number != self.image_id)
        return Rows(len(ids) - len(markers), markers)

    def _between(self, ids: list[int]) -> list[int]:
        """An image's own among those of the text that it is tried in. Raises CheckpointError."""
        at = self._plain.index(self.placeholder_id)
        before, after = self._plain[:at], self._plain[at + 1 :]
        end = len(ids) - len(after)
        if ids[:at] != before or ids[end:] != after or end < at:
            raise CheckpointError(
                f"{self.processor.label} writes more into a prompt than what an image is (its other tokens differ from "
                "the chat template's), which the general path doesn't; use vLLM or transformers for it"
            )
        return ids[at:end]


def _written(rows: Rows, image_id: int) -> list[int]:
    ids = [image_id] * (rows.tokens + len(rows.markers))
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
