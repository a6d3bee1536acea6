"""The checkpoint's chat template and tokenizer: messages to token ids, where a user's text is never more than text.

Tokenizers turn "<|im_end|>" inside a user's words into the real end-of-turn token. Here the words are marked before the
template is applied, so that only what the template itself writes becomes a special token. For words that spell no
special token the ids equal those of the unsplit processor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from lm_service.engine.detokenizer import TokenTable
from lookonce.checkpoint.files import read_json
from lookonce.errors import CheckpointError, invalid

_PRIVATE_USE = range(0xE000, 0xF900)
_REMEMBERED, _REMEMBERED_CHARACTERS = 1024, 4096
"""Conversations whose ids are kept, and the longest such: the same questions are asked about many pictures."""
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")


@dataclass(frozen=True)
class Turn:
    """One message; None stands for an image."""

    role: str
    parts: tuple[str | None, ...]


class ChatTemplate:
    """Tokenises conversations. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer, template: str, special: dict[str, str]) -> None:
        """`special` are the names a template may use for special tokens (`bos_token` ...)."""
        self._tokenizer = tokenizer
        self._template = template
        self._names: dict[str, Any] = dict(special)
        self._tokenizer.encode_special_tokens = True  # what a text spells stays text
        added = tokenizer.get_added_tokens_decoder()
        self._added = {token.content: number for number, token in added.items()}
        longest_first = sorted(self._added, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._starts = re.compile("[" + "".join(re.escape(token[0]) for token in longest_first) + "]")
        special_ids = [number for number, token in added.items() if token.special]
        names = {number: content for content, number in self._added.items()}
        self.table = TokenTable.of(tokenizer.get_vocab(), names, special_ids)
        self._remembered = lru_cache(maxsize=_REMEMBERED)(self._ids)
        self._choices = lru_cache(maxsize=_REMEMBERED)(lambda text: tuple(self.text_ids(text)))

    def ids(self, turns: Sequence[Turn]) -> list[int]:
        """Token ids of the conversation and of the header of the answer; one placeholder token per image.

        Raises INVALID_ARGUMENT when the checkpoint's template refuses the messages.
        """
        short = sum(len(part) for turn in turns for part in turn.parts if part is not None) <= _REMEMBERED_CHARACTERS
        return list(self._remembered(tuple(turns)) if short else self._ids(turns))

    def _ids(self, turns: Sequence[Turn]) -> tuple[int, ...]:
        mark = self._mark(turns)
        messages: list[Any] = [
            {"role": turn.role, "content": [self._part(part, mark) for part in turn.parts]} for turn in turns
        ]
        try:
            rendered: Any = render_jinja_template(
                [messages], chat_template=self._template, add_generation_prompt=True, **self._names
            )
        except TemplateError as error:
            raise invalid(
                "messages: the model's chat template refuses this order of roles", param="messages"
            ) from error
        return tuple(token for piece in self._pieces(rendered[0][0]) for token in self._encode(piece, mark))

    def text_ids(self, text: str) -> list[int]:
        """Token ids of plain text, special tokens spelt in it included as text."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def choice_ids(self, text: str) -> tuple[int, ...]:
        """`text_ids` of a short text that is likely to be asked for again."""
        return self._choices(text)

    def token_id(self, token: str) -> int | None:
        """The id of an added token, if the vocabulary has it."""
        return self._added.get(token)

    def _mark(self, turns: Sequence[Turn]) -> str:
        """A character that none of the texts holds."""
        used = {character for turn in turns for part in turn.parts if part is not None for character in part}
        mark = next((chr(code) for code in _PRIVATE_USE if chr(code) not in used), None)
        if mark is None:
            raise invalid("messages: the text uses every private-use character of Unicode", param="messages")
        return mark

    def _part(self, part: str | None, mark: str) -> dict[str, str]:
        if part is None:
            return {"type": "image"}
        # Wherever a special token could begin, also one that goes on in the next part, the mark breaks it.
        return {"type": "text", "text": self._starts.sub(lambda match: match.group() + mark, part)}

    def _pieces(self, text: str) -> Iterator[str | int]:
        """Stretches of plain text, and the ids of the special tokens between them."""
        at = 0
        for match in self._special.finditer(text):
            yield text[at : match.start()]
            yield self._added[match.group()]
            at = match.end()
        yield text[at:]

    def _encode(self, piece: str | int, mark: str) -> list[int]:
        return [piece] if isinstance(piece, int) else self.text_ids(piece.replace(mark, ""))


def load_template(path: Path) -> ChatTemplate:
    """The template and tokenizer of a checkpoint directory. CheckpointError naming what is missing."""
    file = path / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(f"{path}: the tokenizer is missing; copy tokenizer.json from the model's repository")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more specific
        raise CheckpointError(f"{file} is no tokenizer; copy it from the model's repository") from error
    settings_file = path / "tokenizer_config.json"
    settings = read_json(settings_file) if settings_file.is_file() else {}
    _add_missing(tokenizer, settings.get("added_tokens_decoder") or {})
    template = _stored_template(path) or settings.get("chat_template")
    if not isinstance(template, str):
        raise CheckpointError(
            f"{path} has no chat template; use an instruction-tuned checkpoint or copy its chat_template.jinja"
        )
    return ChatTemplate(tokenizer, template, dict(_special_names(settings)))


def _add_missing(tokenizer: Tokenizer, stated: dict[str, Any]) -> None:
    """Added tokens that only tokenizer_config.json knows, as older repositories have them; in order of id."""
    for _, entry in sorted(stated.items(), key=lambda item: int(item[0])):
        if tokenizer.token_to_id(entry["content"]) is None:
            token = AddedToken(entry["content"], special=bool(entry.get("special")), normalized=False)
            tokenizer.add_special_tokens([token]) if token.special else tokenizer.add_tokens([token])


def _special_names(settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = settings.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            yield name, content


def _stored_template(path: Path) -> str | None:
    for name in _TEMPLATE_FILES:
        file = path / name
        if file.is_file():
            return file.read_text(encoding="utf-8") if name.endswith(".jinja") else read_json(file).get("chat_template")
    return None
