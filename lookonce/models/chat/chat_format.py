"""A checkpoint's chat template, rendered: from turns of text and images to the text of a prompt. No torch.

Templates take a message's content as a list of parts or as one string. Which of them takes what is found out once, by
rendering a probe for each role: a text is never given to a template in a form that it would print.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jinja2 import Template, TemplateError
from tokenizers import AddedToken, Tokenizer

from lookonce.core.errors import CheckpointError
from lookonce.models.chat.sandbox import compiled
from lookonce.models.chat.tokenizer import continued, leading_ids, load_tokenizer, tokenizer_settings
from lookonce.models.checkpoint.files import CONFIG, Problems, read_config, read_json
from lookonce.models.family import Family, SpecialTokens

_log = logging.getLogger(__name__)
_ROLES = ("user", "system", "assistant")  # in the order in which they are probed: the others stand beside a user's
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
_DEFAULT = "default"
_PROBE = "lookonce"
TOOL = "tool"  # the role of what a call returned
CALL_BEGIN, CALL_END = "<tool_call>\n", "\n</tool_call>"
_TOOLS_TOLD = (
    "Functions can be called. To call one, write <tool_call>, then on a line of its own a JSON object with its name "
    'and its arguments, as in {"name": "function", "arguments": {"argument": "value"}}, then </tool_call>. They are:'
)
_ABSENT = {"tools": None, "documents": None, "add_generation_prompt": True}  # what templates may ask after


class TemplateRefusal(Exception):
    """The template raised an error for these turns; its cause says which."""


@dataclass(frozen=True)
class Turn:
    """One message; None stands for an image. `calls`, of an earlier answer: JSON objects of `name` and `arguments`."""

    role: str
    parts: tuple[str | None, ...]
    calls: tuple[str, ...] = ()


_NEIGHBOUR = Turn("user", ("Hm?",))


def tools_as_text(turns: Sequence[Turn], tools: Sequence[Any]) -> list[Turn]:
    """The same conversation for a template without tools: functions are told of in the instructions, calls are text of
    the answer that made them, and what they returned is the user's. The tags are Qwen's."""
    told, found = [], list[Turn]()
    if tools:
        listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        told = [f"{_TOOLS_TOLD}\n<tools>\n{listed}\n</tools>"]
    for turn in turns:
        if turn.role == TOOL:
            said = ("<tool_response>\n", *turn.parts, "\n</tool_response>")
            if found and found[-1].role == TOOL:
                found[-1] = Turn(TOOL, (*found[-1].parts, "\n", *said))
            else:
                found.append(Turn(TOOL, said))
        else:
            calls = "\n".join(f"{CALL_BEGIN}{call}{CALL_END}" for call in turn.calls)
            between = "\n" if calls and any(turn.parts) else ""
            found.append(Turn(turn.role, (*turn.parts, *filter(None, [between, calls]))))
    found = [Turn("user", turn.parts) if turn.role == TOOL else turn for turn in found]
    if told and found and found[0].role == "system":
        return [Turn("system", (*found[0].parts, "\n\n", *told)), *found[1:]]
    return [Turn("system", tuple(told)), *found] if told else found


class ChatFormat:
    """Tokenizer and template of one checkpoint. Safe to use from several threads."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str,
        names: dict[str, str],
        image: str = "",
        reserved: Collection[int] = (),
        around: tuple[str, str] = ("", ""),
    ) -> None:
        """`names` are those a template may use for special tokens (`bos_token` ...); `image` is what stands for an
        image in a message that the template takes as one string; `reserved` ids stand for images and their like;
        `around` is what is written before and behind each image."""
        self.tokenizer = tokenizer
        self._source = template
        self._template: Template | None = None  # compiled when it is first rendered: a bad one refuses all turns
        self._names: dict[str, Any] = dict(names)
        self._image, self._around = image, around
        self._reserved = frozenset(reserved)
        self.tokenizer.encode_special_tokens = True  # what a text spells stays text
        decoder = tokenizer.get_added_tokens_decoder()
        found = {number: token for number, token in decoder.items() if not _is_space(token)}
        self.added: dict[str, int] = {token.content: number for number, token in found.items()}
        self.lead = leading_ids(tokenizer)
        self.continued = continued(tokenizer)
        tokens = sorted(found.values(), key=lambda token: len(token.content), reverse=True)
        self._special = re.compile("|".join(map(_spelt, tokens)) or "(?!)")
        self._takes_strings: set[str] = set()
        for role in _ROLES:
            if self._takes_only_strings(role):
                self._takes_strings.add(role)

    def render(
        self,
        turns: Sequence[Turn],
        tools: Sequence[Any] = (),
        arguments: Mapping[str, Any] = MappingProxyType({}),
        *,
        header: bool = True,
    ) -> str:
        """The prompt's text, up to and (unless `header` is false) with the header of the answer. `tools` are functions
        as objects of `name`, `description` and `parameters`; `arguments` are further variables of the template. Raises
        TemplateRefusal."""
        if (tools or any(turn.calls or turn.role == TOOL for turn in turns)) and not self.writes_tools:
            turns, tools = tools_as_text(turns, tools), ()
        given = {**arguments, "add_generation_prompt": header}
        text = self._render([self._message(turn) for turn in turns], tools, given)
        return text.replace(self._image, self._image.join(self._around)) if any(self._around) else text

    @cached_property
    def writes_tools(self) -> bool:
        """Whether the template itself tells of functions, and writes calls and what they return, in the form that an
        answer's calls are read in."""
        call = json.dumps({"name": _PROBE, "arguments": {"a": 1}})
        turns = [_NEIGHBOUR, Turn("assistant", ("",), (call,)), Turn(TOOL, ("seven",))]
        try:
            text = self._render([self._message(turn) for turn in turns], [{"name": "tell", "parameters": {}}])
        except TemplateRefusal:
            return False
        return '"tell"' in text and f'{CALL_BEGIN}{{"name": "{_PROBE}"' in text and "seven" in text

    def _message(self, turn: Turn) -> dict[str, Any]:
        message = {"role": turn.role, "content": self._content(turn)}
        if turn.calls:
            calls = [json.loads(call) for call in turn.calls]
            message["tool_calls"] = [{"type": "function", "function": call} for call in calls]
        return message

    @cached_property
    def structure(self) -> frozenset[str]:
        """Added tokens that structure prompts: what the template writes around any message, what begins, ends or fills
        a text, what stands for images. They are never read out of a message."""
        ids = set(self._reserved)
        for turns in (
            [Turn("user", (None, _PROBE))],
            [Turn("system", (_PROBE,)), _NEIGHBOUR, Turn("assistant", ("",))],
        ):
            with contextlib.suppress(TemplateRefusal):
                ids.update(piece for piece in self.pieces(self.render(turns)) if isinstance(piece, int))
        named = {token for token in self._names.values() if token in self.added}
        return frozenset(token for token, number in self.added.items() if number in ids or token in named)

    def pieces(self, text: str) -> Iterator[str | int]:
        """Spans of plain text, and the ids of the special tokens between them."""
        at = 0
        for match in self._special.finditer(text):
            yield text[at : match.start()]
            spelt = match.group()
            yield self.added[spelt if spelt in self.added else spelt.strip()]
            at = match.end()
        yield text[at:]

    def begins(self, text: str) -> bool:
        """Whether a rendered text begins with <s> (`bos_token`) itself, images apart: then the tokenizer adds nothing
        before it."""
        begin = self._names.get("bos_token")
        return begin is not None and (text.replace(self._image, "") if self._image else text).startswith(begin)

    def _content(self, turn: Turn) -> Any:
        if turn.role in self._takes_strings or (turn.role == TOOL and None not in turn.parts):
            return "".join(self._image if part is None else part for part in turn.parts)
        return [{"type": "image"} if part is None else {"type": "text", "text": part} for part in turn.parts]

    def _render(
        self,
        messages: list[dict[str, Any]],
        tools: Sequence[Any] = (),
        arguments: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        listed = [{"type": "function", "function": tool} for tool in tools] or None
        given = {**_ABSENT, **arguments, "tools": listed, **self._names}
        try:
            if self._template is None:
                self._template = compiled(self._source)
            return self._template.render({**given, "messages": messages})
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise TemplateRefusal from error

    def _takes_only_strings(self, role: str) -> bool:
        """Whether the template prints, drops or refuses a list where it says the text of a string."""
        return not self._says(role, [{"type": "text", "text": _PROBE}]) and self._says(role, _PROBE)

    def _says(self, role: str, content: Any) -> bool:
        """Whether a message's text is in the prompt, and nothing of a list around it."""
        probe, user = {"role": role, "content": content}, {"role": "user", "content": self._content(_NEIGHBOUR)}
        messages = {"user": [probe], "system": [probe, user], "assistant": [user, probe]}[role]
        try:
            text = self._render(messages)
        except TemplateRefusal:
            return False
        return _PROBE in text and "'text'" not in text and '"text"' not in text


def _is_space(token: AddedToken) -> bool:
    """Whether it is text like any other: Gemma's tokenizers add several newlines as one token, which no one marks."""
    return not token.special and not token.content.strip()


def _spelt(token: AddedToken) -> str:
    """A pattern of a token and of the white space beside it that belongs to it."""
    return r"\s*" * token.lstrip + re.escape(token.content) + r"\s*" * token.rstrip


def open_chat(path: Path, family: Family, image: str = "") -> ChatFormat:
    """The tokenizer and template of a checkpoint directory; `image` is as in ChatFormat. CheckpointError naming all
    that is missing."""
    problems = Problems()
    tokenizer = problems.of(load_tokenizer, path, family.words)
    template = problems.of(stored_template, path, getattr(family, "template", None))
    if tokenizer is None or template is None:
        raise CheckpointError(*problems.found)
    config = read_config(path) if (path / CONFIG).is_file() else {}
    reserved = [number for name in family.token_id_fields if isinstance(number := config.get(name), int)]
    around = getattr(family, "around_images", ("", "")) if image else ("", "")
    return ChatFormat(tokenizer, template, dict(_special_names(tokenizer_settings(path))), image, reserved, around)


def end_token_ids(path: Path, family: Family, config: dict[str, Any], chat: ChatFormat) -> frozenset[int]:
    """Tokens that end a turn: generation_config.json's, config.json's, or the family's. Raises CheckpointError."""
    file = path / "generation_config.json"
    stated = read_json(file).get("eos_token_id") if file.is_file() else None
    if stated is None:
        stated = family.text_config(config).get("eos_token_id")
    if stated is None:
        stated = chat.added.get(family.special_tokens(config).turn_end)
    ids = stated if isinstance(stated, list) else [stated]
    if not ids or not all(isinstance(number, int) for number in ids):
        raise CheckpointError(
            f"{file}: eos_token_id must be the id of a token or a list of such, got {stated!r}; "
            "copy the file from the model's repository"
        )
    return frozenset(ids)


def prompt_problems(
    chat: ChatFormat, path: Path, family: Family, tokens: SpecialTokens | None, rows: int
) -> Iterator[str]:
    """What keeps prompts from being made: tokens beyond the embedding's rows, no place for an image, a lost question.

    `tokens` are None where config.json's are wrong: then no image is looked for."""
    largest, token = max((number, token) for token, number in chat.tokenizer.get_vocab().items())
    if largest >= rows:
        yield (
            f"{path}: the tokenizer is larger than the embedding: token {token!r} has id {largest}, vocab_size is "
            f"{rows}; take tokenizer and weights from the same repository"
        )
    if tokens is None:
        return
    if tokens.image_id not in chat.added.values():
        name = family.token_id_fields[0]
        yield (
            f"{path}: config.json's {name} {tokens.image_id} is no special token of the tokenizer; "
            "take both from the same repository"
        )
        return
    yield from _rendering_problems(chat, path, family, tokens)


def _rendering_problems(chat: ChatFormat, path: Path, family: Family, tokens: SpecialTokens) -> Iterator[str]:
    remedy = f"use the chat template of an instruction-tuned {family.label} (its chat_template.json)"
    try:
        text = chat.render([Turn("user", (None, _PROBE))])
    except TemplateRefusal as refusal:
        _log.info("the chat template of %s fails: %r", path, refusal.__cause__)
        yield f"{path}: the chat template can't be rendered for a user's message with an image; {remedy}"
        return
    count = list(chat.pieces(text)).count(tokens.placeholder_id)
    if count != 1:
        yield f"{path}: the chat template writes {count} placeholders ({tokens.image}) for one image; {remedy}"
    if _PROBE not in text:
        yield f"{path}: the chat template leaves out the user's text; {remedy}"


def stored_template(path: Path, default: str | None = None) -> str:
    """The chat template: a file of its own or a field of tokenizer_config.json, one text or a list of named ones; the
    `default` of a family whose checkpoints have none."""
    for name in _TEMPLATE_FILES:
        file = path / name
        if file.is_file():
            if name.endswith(".jinja"):
                return _text_of(file)
            return _chosen(read_json(file).get("chat_template"), file)
    file = path / "tokenizer_config.json"
    return _chosen(tokenizer_settings(path).get("chat_template") or default, file)


def _chosen(stored: Any, file: Path) -> str:
    if isinstance(stored, list):
        named = {entry.get("name"): entry.get("template") for entry in stored if isinstance(entry, dict)}
        stored = named.get(_DEFAULT)
        if named and stored is None:
            raise CheckpointError(
                f"{file}: chat_template lists {', '.join(map(str, named))}, and none is named {_DEFAULT!r}; "
                f"rename the one to use, or write it to {file.parent / _TEMPLATE_FILES[0]}"
            )
    if not isinstance(stored, str):
        raise CheckpointError(
            f"{file.parent} has no chat template; use an instruction-tuned checkpoint or copy its chat_template.jinja"
        )
    return stored


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise CheckpointError(f"{file} cannot be read as UTF-8; copy it from the model's repository") from None


def _special_names(settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = settings.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            yield name, content
