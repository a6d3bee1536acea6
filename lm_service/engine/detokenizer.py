"""Token ids to text as they come, for byte-level BPE: whole characters only, the same text as decoding all at once.

Knows nothing of stop strings (see `answer`) or of models.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator

_DECODER = codecs.getincrementaldecoder("utf-8")


def byte_level_alphabet() -> dict[str, int]:
    """Byte of each character that byte-level BPE (GPT-2's `bytes_to_unicode`) writes bytes with."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class TokenTable:
    """The bytes of every token of a vocabulary, worked out once at start."""

    def __init__(self, tokens: Iterable[tuple[int, bytes]], special: Iterable[int] = ()) -> None:
        """`special` tokens are left out of the text."""
        self._bytes = dict(tokens)
        self.special = frozenset(special)

    @classmethod
    def of(cls, vocabulary: dict[str, int], added: dict[int, str], special: Iterable[int]) -> TokenTable:
        """The table of a byte-level BPE vocabulary; `added` tokens stand for themselves."""
        return cls(_tokens(vocabulary, added), special)

    def piece(self, token_id: int) -> bytes:
        """A token's bytes, those of special tokens included; empty for an id that stands for nothing."""
        return self._bytes.get(token_id, b"")

    def text(self, token_id: int) -> str:
        """A token on its own, half characters replaced: for people reading log-probabilities."""
        return self.piece(token_id).decode("utf-8", "replace")

    def detokenizer(self) -> Detokenizer:
        """A fresh one, for one answer."""
        return Detokenizer(self)


class Detokenizer:
    """The text of one growing answer."""

    def __init__(self, table: TokenTable) -> None:
        self._table = table
        self._decoder = _DECODER(errors="replace")

    def push(self, token_id: int) -> str:
        """The characters this token completes; empty while one is incomplete and for special tokens."""
        if token_id in self._table.special:
            return ""
        return self._decoder.decode(self._table.piece(token_id))

    def flush(self) -> str:
        """What is left at the end: a replacement character where a character stayed incomplete."""
        return self._decoder.decode(b"", final=True)


def _tokens(vocabulary: dict[str, int], added: dict[int, str]) -> Iterator[tuple[int, bytes]]:
    alphabet = byte_level_alphabet()
    for token, number in vocabulary.items():
        if number in added:
            yield number, added[number].encode()
        elif all(character in alphabet for character in token):
            yield number, bytes(alphabet[character] for character in token)
        else:
            yield number, token.encode()
