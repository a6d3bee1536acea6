"""One answer taking shape: tokens in, deltas out, and the reason it ends. For all engines; knows nothing of models.

Tokens become text as they come, for byte-level BPE and sentencepiece: whole characters only, the same text as decoding
all at once.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Sequence, Set

from lm_service.engine.types import Delta, FinishReason, Sampling, TokenLogprob

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_DECODER = codecs.getincrementaldecoder("utf-8")


def byte_level_alphabet() -> dict[str, int]:
    """Byte of each character that byte-level BPE (GPT-2's `bytes_to_unicode`) writes bytes with."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class TokenTable:
    """The bytes of every token of a vocabulary, worked out once at start."""

    def __init__(
        self,
        tokens: Iterable[tuple[int, bytes]],
        special: Iterable[int] = (),
        *,
        single_bytes: Iterable[int] = (),
        spaced: bool = False,
    ) -> None:
        """`special` tokens are left out of an answer's text unless it is asked for them. Neighbouring `single_bytes`
        are text together, or unreadable each; `spaced`: a space that begins the text is left out."""
        self._bytes = dict(tokens)
        self.special = frozenset(special)
        self.single_bytes = frozenset(single_bytes)
        self.spaced = spaced

    @classmethod
    def of(
        cls,
        vocabulary: dict[str, int],
        added: dict[int, str],
        special: Iterable[int],
        *,
        byte_level: bool = True,
        spaced: bool = True,
    ) -> TokenTable:
        """The table of a byte-level BPE vocabulary, or of sentencepiece's; `added` tokens stand for themselves.
        `spaced`: sentencepiece's leaves out a space that begins the text."""
        if byte_level:
            return cls(_tokens(vocabulary, added), special)
        bytes_alone = (number for token, number in vocabulary.items() if _BYTE.fullmatch(token) and number not in added)
        return cls(_pieces(vocabulary, added), special, single_bytes=bytes_alone, spaced=spaced)

    @property
    def pieces(self) -> list[bytes]:
        """Those of all tokens by id, as `piece` has them."""
        return [self.piece(token_id) for token_id in range(max(self._bytes, default=-1) + 1)]

    def piece(self, token_id: int) -> bytes:
        """A token's bytes, those of special tokens included; empty for an id that stands for nothing."""
        return self._bytes.get(token_id, b"")

    def text(self, token_id: int) -> str:
        """A token on its own, half characters replaced: for people reading log-probabilities."""
        return self.piece(token_id).decode("utf-8", "replace")


class Detokenizer:
    """The text of one growing answer."""

    def __init__(self, table: TokenTable, *, special: bool = False) -> None:
        """`special`: special tokens are part of the text."""
        self._table = table
        self._hidden = frozenset() if special else table.special
        self._decoder = _DECODER(errors="replace")
        self._run = b""  # of `single_bytes`, until another token follows
        self._at_start = table.spaced

    def push(self, token_id: int) -> str:
        """The characters this token completes; empty while one is incomplete and for a token that is left out."""
        piece = self._table.piece(token_id)
        if not piece or token_id in self._hidden:
            return ""
        if token_id in self._table.single_bytes:
            self._run += piece
            return ""
        return self._begun(self._ended_run() + self._decoder.decode(piece))

    def flush(self) -> str:
        """What is left at the end: a replacement character where a character stayed incomplete."""
        return self._begun(self._ended_run() + self._decoder.decode(b"", final=True))

    def _ended_run(self) -> str:
        run, self._run = self._run, b""
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _begun(self, text: str) -> str:
        if not self._at_start or not text:
            return text
        self._at_start = False
        return text.removeprefix(" ")


def _tokens(vocabulary: dict[str, int], added: dict[int, str]) -> Iterator[tuple[int, bytes]]:
    alphabet = byte_level_alphabet()
    for token, number in vocabulary.items():
        if number in added:
            yield number, added[number].encode()
        elif all(character in alphabet for character in token):
            yield number, bytes(alphabet[character] for character in token)
        else:
            yield number, token.encode()


def _pieces(vocabulary: dict[str, int], added: dict[int, str]) -> Iterator[tuple[int, bytes]]:
    """Of sentencepiece: a space is ▁, and a token such as <0x0A> one byte."""
    for token, number in vocabulary.items():
        byte = _BYTE.fullmatch(token)
        if number in added:
            yield number, added[number].encode()
        elif byte is not None:
            yield number, bytes([int(byte[1], 16)])
        else:
            yield number, token.replace("▁", " ").encode()


class StopMatcher:
    """Finds stop strings in text that comes in pieces, and holds back what may yet become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self._passed = 0  # characters of what is held in which no stop string may end

    def push(self, text: str, *, early: bool = False) -> tuple[str, str | None]:
        """Text that may be shown, and the stop string met. The one that ends first wins, then the longest, however the
        text was cut into pieces; nothing from its start on is shown. One that ends in `early` text is text."""
        if not self._stops:
            return text, None
        self._held += text
        if early:
            self._passed = len(self._held)
        places = ((stop, self._held.find(stop, max(0, self._passed + 1 - len(stop)))) for stop in self._stops)
        found = [(at + len(stop), at, stop) for stop, at in places if at >= 0]
        if found:
            _, start, stop = min(found)
            shown, self._held = self._held[:start], ""
            return shown, stop
        keep = max(_overlap(self._held, stop) for stop in self._stops)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        self._passed = max(0, self._passed - cut)
        return shown, None

    def flush(self) -> str:
        """The text held back, at the end of an answer that met no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


class Answer:
    """Answer `index` of a request."""

    def __init__(self, index: int, sampling: Sampling, table: TokenTable, end_ids: Set[int], room: int) -> None:
        """`end_ids` end a turn; `room` is how many tokens the context has left after the prompt."""
        self.index = index
        self.tokens: list[int] = []
        self.reason: FinishReason | None = None
        self.stop: str | None = None  # the stop string that was met
        self._limit = min(sampling.max_tokens, room)
        self._least = sampling.min_tokens
        self._end_ids = frozenset(sampling.stop_ids) | (frozenset() if sampling.ignore_eos else frozenset(end_ids))
        self._text, self._logprobs, self._taken = "", list[TokenLogprob](), 0  # since the last `take`
        self._detokenizer = Detokenizer(table, special=sampling.special_tokens)
        self._matcher = StopMatcher(sampling.stop)

    def push(self, token_id: int, logprob: TokenLogprob | None = None) -> None:
        """Add the next token. When it ends the answer, `reason` (and `stop`) are set."""
        self.tokens.append(token_id)
        if logprob is not None:
            self._logprobs.append(logprob)
        if token_id in self._end_ids and len(self.tokens) > self._least:
            self.reason = FinishReason.STOP
            text = self._rest("")
        else:
            early = len(self.tokens) < self._least
            text, self.stop = self._matcher.push(self._detokenizer.push(token_id), early=early)
            if self.stop is not None:
                self.reason = FinishReason.STOP
            elif len(self.tokens) >= self._limit:
                self.reason = FinishReason.LENGTH
                text = self._rest(text)
        self._text += text

    @property
    def left(self) -> int:
        """How many tokens may follow."""
        return self._limit - len(self.tokens)

    def end(self) -> None:
        """The last token completed what the answer must be."""
        if self.reason is None:
            self.reason = FinishReason.STOP
            self._text += self._rest("")

    def take(self) -> Delta:
        """What came since this was called last. Once the answer has ended no text is held back."""
        delta = Delta(self.index, self._text, tuple(self.tokens[self._taken :]), tuple(self._logprobs))
        self._text, self._logprobs, self._taken = "", [], len(self.tokens)
        return delta

    def _rest(self, shown: str) -> str:
        text, self.stop = self._matcher.push(self._detokenizer.flush())
        if self.stop is not None:
            self.reason = FinishReason.STOP
        return shown + text + self._matcher.flush()
