"""What an answer must be: a JSON Schema, a regular expression, one of some texts, or a grammar, compiled by llguidance
into masks over the vocabulary. For all engines.

JSON is written on one line, with ", " and ": " between its parts. Of a schema's object with `properties` and without
`additionalProperties`, an answer has no others: all that it has is in the schema, and a model that runs on ends. Where
a model would end an answer whose JSON is not complete, what is open is closed: it has no more to say.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par

from lookonce.core.errors import LookonceError, invalid

MAX_CHARACTERS = 200_000
"""Of a structure's source."""
MAX_DEPTH = 64
"""Levels of a schema's JSON."""
MAX_CHOICES = 1000
_CLOSING = (b"a", b"}", b"]", b'"')  # a letter, and what closes
_KEPT = 64  # compiled grammars
_DEAD = "NoExtension"  # begins what llguidance says of a grammar without a first token
_TOLD = 300  # characters of what is said about a faulty grammar
_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_COMBINING = ("allOf", "anyOf", "oneOf", "$ref", "not", "if", "patternProperties")
_YEAR = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_LEAP = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DAY = "0[1-9]|1[0-9]|2[0-8]"
_DAYS = f"(?:0[13578]|1[02])-(?:{_DAY}|29|3[01])|(?:0[469]|11)-(?:{_DAY}|29|30)|02-(?:{_DAY})"
_DATE = f"(?:{_YEAR}-(?:{_DAYS})|{_LEAP}-02-29)"
_HOUR = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_HOUR}:[0-5][0-9](?:\.[0-9]{{1,6}})?(?:Z|[+-]{_HOUR})"
_PATTERNS = {"date": _DATE, "time": _TIME, "date-time": f"{_DATE}T{_TIME}"}
"""RFC 3339's, without leap seconds: llguidance's own let through days that a month does not have."""
_UNBOUND = frozenset({"password", "binary", "path", "file-path", "directory-path"})
"""Formats that any text has."""
_SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_SCHEMA_LISTS = ("anyOf", "oneOf", "prefixItems", "items")
_SCHEMAS = ("items", "additionalProperties", "additionalItems")


class Kind(StrEnum):
    """Of a structure; the names are those of the contract's field."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICES = "choices"
    GRAMMAR = "grammar"
    TOOLS = "tools"  # a grammar whose JSON is closed as a schema's


@dataclass(frozen=True)
class Structure:
    """What a request asks for."""

    kind: Kind
    source: str  # choices: a JSON list of texts


_JSON_KINDS = frozenset({Kind.JSON_SCHEMA, Kind.TOOLS})


class Grammar:
    """A structure compiled for one vocabulary."""

    def __init__(self, structure: Structure, pristine: LLMatcher, words: Words) -> None:
        """`structure` is what was compiled, options of llguidance's included; `pristine` has taken no token."""
        self.structure = structure
        self._pristine, self._words = pristine, words

    def matcher(self) -> Matcher:
        """For one answer."""
        return Matcher(self._pristine.deep_copy(), self._words, is_json=self.structure.kind in _JSON_KINDS)


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(self, state: LLMatcher, words: Words, *, is_json: bool) -> None:
        self.state, self._words, self._is_json = state, words, is_json
        self.vocabulary, self.end_ids = len(words.tokens), words.end_ids

    @property
    def complete(self) -> bool:
        """Whether nothing but the end can follow."""
        return self.state.is_stopped() and not self.state.is_error()

    @property
    def failed(self) -> bool:
        """Whether a bound of llguidance's was met: the answer can't go on."""
        return self.state.is_error()

    def take(self, token_id: int) -> None:
        """The answer goes on with this token."""
        if not self.state.is_stopped():
            self.state.consume_token(token_id)

    def closing(self, may_follow: Callable[[int], bool]) -> int | None:
        """The token that closes what is open in JSON: the quotation mark within a string, where letters may follow,
        too; else a bracket."""
        if not self._is_json:
            return None
        letter, *signs = (self._words.one(sign) for sign in _CLOSING)
        if letter is not None and may_follow(letter):
            signs.reverse()
        return next((sign for sign in signs if sign is not None and may_follow(sign)), None)

    def forced(self) -> list[int]:
        """Tokens of the only text that can follow, as the tokenizer writes it; none where there is a choice."""
        return self.state.compute_ff_tokens()


class Masks:
    """Masks of several answers at once, by a few threads without Python's lock."""

    def __init__(self, threads: int) -> None:
        self._threads = threads

    @cached_property
    def _executor(self) -> LLExecutor:
        return LLExecutor(num_threads=self._threads)

    def of(self, matchers: Sequence[Matcher]) -> npt.NDArray[np.int32]:
        """Bits int32 [answers, ceil(vocabulary / 32)] of the tokens that may follow, the first in the lowest bit. All
        matchers are of one vocabulary."""
        bits = np.zeros((len(matchers), (matchers[0].vocabulary + 31) // 32), dtype=np.int32)
        if len(matchers) == 1:
            fill_next_token_bitmask(matchers[0].state, bits)
        else:
            fill_next_token_bitmask_par(self._executor, [(each.state, at) for at, each in enumerate(matchers)], bits)
        return bits


class Grammars:
    """Compiles the structures that requests ask for, and keeps those asked for last. Safe to use from any thread."""

    def __init__(
        self,
        tokens: Sequence[bytes],
        special: Iterable[int],
        end_ids: Iterable[int],
        encode: Callable[[str], list[int]],
    ) -> None:
        """`tokens` are the bytes of every token by id; none of the `special` is part of an answer, and the `end_ids`
        end it; `encode` writes a text within an answer in tokens."""
        self._words = Words(tokens, sorted(special), sorted(end_ids), encode)
        self._kept: OrderedDict[Structure, Grammar] = OrderedDict()
        self._lock = threading.Lock()

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        """Made for the first structure."""
        return LLTokenizer(self._words, eos_token=self._words.end_ids)  # type: ignore[arg-type]

    def compile(self, wanted: Structure, param: str) -> Grammar:
        """The grammar. Blocking: milliseconds, or a second for the largest that is taken. Raises INVALID_ARGUMENT
        naming `param` and what is wrong."""
        if len(wanted.source) > MAX_CHARACTERS:
            raise invalid(f"{param} may have {MAX_CHARACTERS} characters, got {len(wanted.source)}", param=param)
        with self._lock:
            found = self._kept.get(wanted)
            if found is not None:
                self._kept.move_to_end(wanted)
                return found
        structure = _prepared(wanted, param)
        grammar = Grammar(structure, self._compiled(structure, param), self._words)
        with self._lock:
            self._kept[wanted] = grammar
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return grammar

    def _compiled(self, structure: Structure, param: str) -> LLMatcher:
        text = _READ[structure.kind](structure.source)
        matcher = LLMatcher(self._tokenizer, text, log_level=0, limits=LLParserLimits())
        trial = matcher.deep_copy()
        if not trial.is_error():
            trial.compute_bitmask()  # meets what only a first token does
        if trial.is_error():
            raise invalid(f"{param} can't be held: {_told(trial.get_error())}", param=param)
        return matcher


class Words:
    """A vocabulary as llguidance asks for it."""

    bos_token_id = None
    is_tokenizer_wrapper = True

    def __init__(
        self, tokens: Sequence[bytes], special: list[int], end_ids: list[int], encode: Callable[[str], list[int]]
    ) -> None:
        self.tokens, self.end_ids, self._encode = tokens, end_ids, encode
        self.eos_token_id = end_ids[0]
        self._ones = {sign: tokens.index(sign) for sign in _CLOSING if sign in tokens}
        self.special_token_ids = sorted({*special, *end_ids})

    def one(self, sign: bytes) -> int | None:
        """The token of one of the signs of `_CLOSING` alone."""
        return self._ones.get(sign)

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text.decode() if isinstance(text, bytes) else text)


def too_complex() -> LookonceError:
    """What a request is told whose matcher has `failed`."""
    return invalid("the structure of the answer is too complex to go on; ask for a simpler one", param="structure")


def _prepared(wanted: Structure, param: str) -> Structure:
    """Checked, and a schema's objects closed and its JSON written as the module says."""
    if wanted.kind is Kind.CHOICES:
        texts = json.loads(wanted.source)
        if not 1 <= len(texts) <= MAX_CHOICES or not all(texts):
            raise invalid(f"{param} must be 1 to {MAX_CHOICES} texts, none of them empty", param=param)
    if wanted.kind is Kind.JSON_SCHEMA:
        return Structure(wanted.kind, json.dumps(_schema(wanted.source, param)))
    return wanted


def _either(source: str) -> str:
    texts = (json.dumps(text, ensure_ascii=False) for text in json.loads(source))
    return LLMatcher.grammar_from_lark("start: " + " | ".join(texts))


_READ: dict[Kind, Callable[[str], str]] = {
    Kind.JSON_SCHEMA: LLMatcher.grammar_from_json_schema,
    Kind.REGEX: LLMatcher.grammar_from_regex,
    Kind.CHOICES: _either,
    Kind.GRAMMAR: LLMatcher.grammar_from_lark,
    Kind.TOOLS: LLMatcher.grammar_from_lark,
}


def _schema(source: str, param: str) -> dict[str, Any]:
    """What a JSON Schema is compiled from."""
    try:
        schema = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise invalid(f"{param} is not JSON, or is nested too deeply", param=param) from error
    return settled(schema, param)


def settled(schema: Any, param: str) -> dict[str, Any]:
    """A schema, its objects closed and its JSON written as the module says. Raises INVALID_ARGUMENT."""
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise invalid(f"{param} must be a schema: an object", param=param)
    if _is_deeper(schema, MAX_DEPTH):
        raise invalid(f"{param} may have {MAX_DEPTH} levels: move parts of it to $defs", param=param)
    _settle(schema)
    return schema | {"x-guidance": _JSON}


def _is_deeper(value: Any, levels: int) -> bool:
    layer = [value]
    for _ in range(levels):
        layer = [child for each in layer for child in _children(each)]
        if not layer:
            return False
    return True


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _settle(schema: Any) -> None:
    """Say in place what a schema leaves open: its objects are closed, where no other part of it can speak of the same
    object, and its formats are patterns, where those say more."""
    if not isinstance(schema, dict):
        return
    if isinstance(schema.get("properties"), dict) and not any(name in schema for name in _COMBINING):
        schema.setdefault("additionalProperties", False)
    stated = schema.get("format")
    if stated in _UNBOUND or (stated is not None and schema.get("type") in ("integer", "number")):
        del schema["format"]
    elif stated in _PATTERNS and "pattern" not in schema:
        schema["pattern"] = f"^(?:{_PATTERNS[schema.pop('format')]})$"
    for part in _parts(schema):
        _settle(part)


def _parts(schema: dict[str, Any]) -> Iterator[Any]:
    """The schemas within a schema. Those that `allOf` joins are not among them: they are about one value together."""
    joined = any(isinstance(schema.get(name), list) for name in ("anyOf", "oneOf")) and "properties" in schema
    for name in _SCHEMA_MAPS:
        if isinstance(schema.get(name), dict):
            yield from schema[name].values()
    for name in _SCHEMA_LISTS:
        if isinstance(schema.get(name), list) and not joined:
            yield from schema[name]
    for name in _SCHEMAS:
        yield schema.get(name)


def _told(message: str) -> str:
    """What llguidance says of a client's own grammar, on one line."""
    message, _, _ = message.partition("\n<state>")
    return "no answer satisfies it" if message.startswith(_DEAD) else " ".join(message.split())[:_TOLD]
