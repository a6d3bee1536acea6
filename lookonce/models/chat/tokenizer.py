"""A checkpoint's tokenizer: tokenizer.json, or vocab.json and merges.txt as older repositories have them. No torch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from lookonce.core.errors import CheckpointError
from lookonce.models.checkpoint.files import read_json

TOKENIZER, VOCABULARY, MERGES, SETTINGS = "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"
_ADDED = "added_tokens.json"


def byte_level(model: models.BPE, words: str) -> Tokenizer:
    """A byte-level BPE tokenizer after NFC, without added tokens; `words`: how text is split first."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def load_tokenizer(path: Path, words: str) -> Tokenizer:
    """The tokenizer of a checkpoint directory, with every added token that its files state. `words`: how text is split
    where the files don't say so. Raises CheckpointError."""
    tokenizer = _stored(path, words)
    with _readable(path / SETTINGS):
        _add_missing(tokenizer, tokenizer_settings(path).get("added_tokens_decoder") or {})
    if (path / _ADDED).is_file():
        with _readable(path / _ADDED):
            stated = {number: {"content": token, "special": True} for token, number in read_json(path / _ADDED).items()}
            _add_missing(tokenizer, stated)
    return tokenizer


def tokenizer_settings(path: Path) -> dict[str, Any]:
    """tokenizer_config.json, empty when there is none."""
    file = path / SETTINGS
    return read_json(file) if file.is_file() else {}


def leading_ids(tokenizer: Tokenizer) -> list[int]:
    """Special tokens that the tokenizer itself puts before a text, such as <s>."""
    return _around(tokenizer)[0]


def trailing_ids(tokenizer: Tokenizer) -> list[int]:
    """Special tokens that the tokenizer itself puts behind a text, as T5's does."""
    return _around(tokenizer)[1]


def _around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    plain, whole = (tokenizer.encode("a", add_special_tokens=added).ids for added in (False, True))
    for at in range(len(whole) - len(plain) + 1):
        if whole[at : at + len(plain)] == plain:
            return whole[:at], whole[at + len(plain) :]
    return [], []


def continued(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer of text that comes behind other text: one that begins a text with a space (▁) doesn't here."""
    before = tokenizer.pre_tokenizer
    if before is None or b'"first"' not in before.__getstate__():
        return tokenizer
    state = json.loads(tokenizer.to_str())
    state["pre_tokenizer"] = _never_first(state["pre_tokenizer"])
    other = Tokenizer.from_str(json.dumps(state))
    other.encode_special_tokens = tokenizer.encode_special_tokens
    return other


def _never_first(step: dict[str, Any]) -> dict[str, Any]:
    if step.get("prepend_scheme") == "first":
        return step | {"prepend_scheme": "never"}
    return step | {"pretokenizers": [_never_first(each) for each in step.get("pretokenizers", [])]}


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether its tokens are bytes as GPT-2 writes them; else they are sentencepiece's, text with ▁ for a space."""
    return tokenizer.decoder is None or b"ByteLevel" in tokenizer.decoder.__getstate__()


def drops_first_space(tokenizer: Tokenizer) -> bool:
    """Whether a space that begins a text is not part of it (LLaMA's), or is (Gemma's)."""
    state = b"" if tokenizer.decoder is None else tokenizer.decoder.__getstate__()
    return b'"Strip"' in state or (b'"Metaspace"' in state and b'"never"' not in state)


def _stored(path: Path, words: str) -> Tokenizer:
    file = path / TOKENIZER
    if file.is_file():
        with _readable(file):
            return Tokenizer.from_file(str(file))
    if (path / VOCABULARY).is_file() and (path / MERGES).is_file():
        with _readable(path / VOCABULARY, path / MERGES):
            return byte_level(models.BPE.from_file(str(path / VOCABULARY), str(path / MERGES)), words)
    raise CheckpointError(
        f"{path}: the tokenizer is missing; copy {TOKENIZER} (or {VOCABULARY} and {MERGES}) from the model's repository"
    )


def _add_missing(tokenizer: Tokenizer, stated: dict[Any, Any]) -> None:
    """Added tokens that only other files state, as in older repositories; in order of id."""
    for number, entry in sorted(stated.items(), key=lambda item: int(item[0])):
        if tokenizer.token_to_id(entry["content"]) is not None:
            continue
        token = AddedToken(entry["content"], special=bool(entry.get("special")), normalized=False)
        tokenizer.add_special_tokens([token]) if token.special else tokenizer.add_tokens([token])
        given = tokenizer.token_to_id(entry["content"])
        if given != int(number):
            raise CheckpointError(
                f"token {entry['content']!r} is stated to be {number}, but follows the vocabulary as {given}; "
                "take all files of the tokenizer from the same repository"
            )


@contextlib.contextmanager
def _readable(*files: Path) -> Iterator[None]:
    """What the library raises for bad files is nothing more specific than Exception."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        named = " and ".join(map(str, files))
        raise CheckpointError(f"{named}: no tokenizer; copy it from the model's repository") from error
