"""The checkpoint's chat template and tokenizer: messages to token ids, where a user's text is never more than text.

Tokenizers turn "<|im_end|>" inside a user's words into the real end-of-turn token. Here the words are marked before the
template is applied, so that only what the template itself writes becomes a special token. For words that spell no
special token the ids equal those of the unsplit processor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path

from lm_service.engine.answer import TokenTable
from lookonce.core.errors import invalid
from lookonce.models.chat.chat_format import ChatFormat, TemplateRefusal, Turn, open_chat
from lookonce.models.chat.tokenizer import is_byte_level
from lookonce.models.family import Family

__all__ = ["ChatTemplate", "Turn", "load_template"]

_PRIVATE_USE = range(0xE000, 0xF900)
_PRIVATE = re.compile(f"[{chr(_PRIVATE_USE[0])}-{chr(_PRIVATE_USE[-1])}]")
PIECE = 16_384
"""Characters that are tokenised at once where nobody needs the exact ids: some 10 ms."""
_BRIEF = 1024
"""Characters of a text that is tokenised (in 1 ms) without letting go of Python's lock."""
_REMEMBERED, _REMEMBERED_CHARACTERS = 1024, 4096
"""Conversations whose ids are kept, and the longest such: the same questions are asked about many images."""


class ChatTemplate:
    """Tokenises conversations. Safe to use from several threads."""

    def __init__(self, chat: ChatFormat) -> None:
        self.chat = chat
        tokenizer = chat.tokenizer
        self._tokenizer = tokenizer
        self._starts = re.compile("|".join(sorted({re.escape(token[0]) for token in chat.added})) or "(?!)")
        special_ids = [number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special]
        names = {number: content for content, number in chat.added.items()}
        self.table = TokenTable.of(tokenizer.get_vocab(), names, special_ids, byte_level=is_byte_level(tokenizer))
        self._remembered = lru_cache(maxsize=_REMEMBERED)(self._ids)
        self._choices = lru_cache(maxsize=_REMEMBERED)(lambda text, salt: tuple(self.text_ids(text)))

    def ids(self, turns: Sequence[Turn], salt: bytes = b"") -> list[int]:
        """Token ids of the conversation and of the header of the answer; one placeholder token per image. What is
        remembered from an earlier call is so among callers of one salt: the time it takes tells others nothing.

        Raises INVALID_ARGUMENT when the checkpoint's template refuses the messages.
        """
        short = sum(len(part) for turn in turns for part in turn.parts if part is not None) <= _REMEMBERED_CHARACTERS
        return list(self._remembered(tuple(turns), salt) if short else self._ids(turns))

    def count(self, texts: Iterable[str], enough: int) -> int:
        """About how many tokens texts have, looked at in pieces until there are more than `enough`.

        A cut costs a token or two; in a piece are a hundred at the least, as no token has more than some hundred
        characters.
        """
        total = 0
        for text in texts:
            for start in range(0, len(text), PIECE):
                total += len(self.text_ids(text[start : start + PIECE]))
                if total > enough:
                    return total
        return total

    def _ids(self, turns: Sequence[Turn], salt: bytes = b"") -> tuple[int, ...]:
        mark = self._mark(turns)
        # Wherever a special token could begin, also one that goes on in the next part, the mark breaks it.
        marked = [Turn(turn.role, tuple(part and self._marked(part, mark) for part in turn.parts)) for turn in turns]
        try:
            rendered = self.chat.render(marked)
        except TemplateRefusal as error:
            raise invalid(
                "messages: the model's chat template refuses this order of roles", param="messages"
            ) from error
        lead = self.chat.lead if self.chat.lead and not self.chat.begins(rendered) else ()
        pieces = enumerate(self.chat.pieces(rendered))
        return (*lead, *chain.from_iterable(self._encode(piece, mark, first=at == 0) for at, piece in pieces))

    def text_ids(self, text: str) -> list[int]:
        """Token ids of plain text, special tokens spelt in it included as text. Other threads go on meanwhile, unless
        it is brief: the library's `encode` keeps Python's lock, its `encode_batch_fast` does not."""
        if len(text) <= _BRIEF:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def _continued_ids(self, text: str) -> list[int]:
        """`text_ids` of text behind other text."""
        if self.chat.continued is self._tokenizer:
            return self.text_ids(text)
        return self.chat.continued.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def choice_ids(self, text: str, salt: bytes = b"") -> tuple[int, ...]:
        """`text_ids` of a short text that is likely to be asked for again by callers of the same salt."""
        return self._choices(text, salt)

    def token_id(self, token: str) -> int | None:
        """The id of an added token, if the vocabulary has it."""
        return self.chat.added.get(token)

    def _mark(self, turns: Sequence[Turn]) -> str:
        """A character that none of the texts holds."""
        used: set[str] = set()
        for part in chain.from_iterable(turn.parts for turn in turns):
            used.update(_PRIVATE.findall(part or ""))
        mark = next((chr(code) for code in _PRIVATE_USE if chr(code) not in used), None)
        if mark is None:
            raise invalid("messages: the text uses every private-use character of Unicode", param="messages")
        return mark

    def _marked(self, text: str, mark: str) -> str:
        return self._starts.sub(lambda match: match.group() + mark, text)

    def _encode(self, piece: str | int, mark: str, *, first: bool) -> list[int]:
        if isinstance(piece, int):
            return [piece]
        text = piece.replace(mark, "")
        return self.text_ids(text) if first else self._continued_ids(text)


def load_template(path: Path, family: Family, image: str = "") -> ChatTemplate:
    """The template and tokenizer of a checkpoint directory; `image` stands for an image where a template takes strings.

    CheckpointError naming what is missing."""
    return ChatTemplate(open_chat(path, family, image))
