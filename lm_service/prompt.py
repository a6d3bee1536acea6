"""From messages to an engine's Prompt: counts checked, the checkpoint's chat template applied, placeholders expanded
from the grids, positions laid out.

A user's text is never more than text. Tokenizers turn "<|im_end|>" inside a user's words into the real end-of-turn
token. Here the words are marked before the template is applied, so that only what the template itself writes becomes
a special token. For words that spell no special token the ids equal those of the unsplit processor.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from lm_service.engine.answer import TokenTable
from lm_service.engine.types import ImageSpan, Prompt
from lookonce.core.dtypes import SCHEMES
from lookonce.core.errors import ErrorKind, LookonceError, invalid
from lookonce.core.identity import WEIGHTS_DIGEST, EmbeddingReference
from lookonce.models.chat.chat_format import TOOL, ChatFormat, TemplateRefusal, Turn, open_chat
from lookonce.models.chat.tokenizer import drops_first_space, is_byte_level
from lookonce.models.checkpoint import Checkpoint
from lookonce.models.checkpoint.checkpoint import COMPUTE_DTYPES
from lookonce.models.family import Family
from protos.lookonce.v1 import vision_pb2

P = ParamSpec("P")
T = TypeVar("T")
ROLES = ("system", "user", "assistant", TOOL)
SHORT = 4096
"""Characters and image tokens, together, of a prompt that is built sooner (0.3 ms) than a thread could take it over."""
_UNTOLD = (
    "only the language half is here, and no vision service of --vision that runs this checkpoint has been reached; "
    "give one, a half that `lookonce split` wrote, or --encoder-weights"
)
_MARGIN = 4
"""A text is refused by a count in pieces when that is over the context by more than one part in so many."""
_PRIVATE_USE = range(0xE000, 0xF900)
_PRIVATE = re.compile(f"[{chr(_PRIVATE_USE[0])}-{chr(_PRIVATE_USE[-1])}]")
PIECE = 16_384
"""Characters that are tokenised at once where nobody needs the exact ids: some 10 ms."""
_BRIEF = 1024
"""Characters of a text that is tokenised (in 1 ms) without letting go of Python's lock."""
_REMEMBERED, _REMEMBERED_CHARACTERS = 1024, 4096
"""Conversations whose ids are kept, and the longest such: the same questions are asked about many images."""


@dataclass(frozen=True)
class Message:
    """One message of a conversation, its parts in order."""

    role: str
    parts: tuple[str | EmbeddingReference, ...]
    calls: tuple[str, ...] = ()  # of an earlier answer: JSON objects of `name` and `arguments`


def is_short(messages: Sequence[Message]) -> bool:
    """Whether building the prompt may hold up an event loop."""
    parts = [part for message in messages for part in message.parts]
    return len(parts) <= 16 and sum(len(part) if isinstance(part, str) else part.tokens for part in parts) <= SHORT


class PromptThread:
    """The thread that long prompts are built in, one after the other: others' answers keep the event loop and all cores
    but one, and no more than one prompt's memory is needed at a time. Whoever is cancelled while waiting costs nothing.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prompts")

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What the call returns, or raises."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, lambda: call(*args, **kwargs))

    def close(self) -> None:
        """Begin nothing more; the call under way ends by itself."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class AcceptedEncoders:
    """The fingerprints of encoders whose embeddings this model takes, each 64 hexadecimal characters.

    They follow from the digest of the vision half's tensors and from this checkpoint's own settings. A host that has
    neither those tensors nor a half that `lookonce split` wrote is told the digest by a vision service of the same
    checkpoint; until then no encoder is accepted.
    """

    def __init__(self, fingerprints: Sequence[str], untold: _Untold | None = None) -> None:
        self.fingerprints = tuple(fingerprints)
        self._untold = untold

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        encoder_dtype: str,
        encoder_quantization: str = "none",
        encoder_weights: str | None = None,
    ) -> AcceptedEncoders:
        """Those derived from a checkpoint. `encoder_dtype` is a compute dtype, or "auto" for any;
        `encoder_quantization` is "none", or "int8" for weights in int8 on any device; `encoder_weights` the digest of
        the encoders' tensors, unset: the checkpoint's own. Raises CheckpointError."""
        dtypes = COMPUTE_DTYPES if encoder_dtype == "auto" else (encoder_dtype,)
        ways = ("none",) if encoder_quantization == "none" else SCHEMES

        def derive(weights: str) -> tuple[str, ...]:
            return tuple(checkpoint.encoder_spec(dtype, way, weights).fingerprint() for dtype in dtypes for way in ways)

        weights = encoder_weights or checkpoint.vision_weights
        return cls((), _Untold(checkpoint.encoder_identity, derive)) if weights is None else cls(derive(weights))

    @property
    def are_known(self) -> bool:
        """Whether it is known which they are."""
        return self._untold is None

    def learn(self, told: vision_pb2.VisionDescription) -> None:
        """Take a vision service's word for the weights, where they are not known: if it runs this very checkpoint,
        and its fingerprint is the one that follows from what it says and this checkpoint's own settings."""
        if self._untold is None or told.model.checkpoint != self._untold.checkpoint:
            return
        if re.fullmatch(WEIGHTS_DIGEST, told.model.vision_weights) is None:
            return
        fingerprints = self._untold.derive(told.model.vision_weights)
        if told.fingerprint in fingerprints:
            self.fingerprints, self._untold = fingerprints, None

    def check(self, reference: EmbeddingReference) -> None:
        """Raise FINGERPRINT_MISMATCH naming both sides unless the encoder is accepted."""
        if reference.fingerprint in self.fingerprints:
            return
        taken, why = ", ".join(self.fingerprints), "the two services run different models or settings"
        if not self.are_known:
            taken, why = "none yet", _UNTOLD
        raise LookonceError(
            ErrorKind.FINGERPRINT_MISMATCH,
            f"the image was encoded by {reference.fingerprint[:64]!r}, this language model takes {taken}: {why}",
            param="image.fingerprint",
        )


@dataclass(frozen=True)
class _Untold:
    """What the accepted fingerprints will follow from, once the weights are known."""

    checkpoint: str  # identity
    derive: Callable[[str], tuple[str, ...]]  # fingerprints by the digest of the vision half's tensors


@dataclass(frozen=True)
class Rendering:
    """How a conversation is rendered."""

    functions: tuple[str, ...] = ()  # that the answer may want called, as JSON
    arguments: str = ""  # further variables of the template, as JSON
    header: bool = True  # of the answer
    goes_on: bool = False  # the answer goes on within the last message


PLAIN = Rendering()


class PromptBuilder:
    """Builds the prompts of one model."""

    def __init__(
        self,
        template: ChatTemplate,
        family: Family,
        config: dict[str, Any],
        *,
        context_length: int,
        max_images: int,
        check_fingerprint: Callable[[EmbeddingReference], None],
    ) -> None:
        """`config` is the checkpoint's config.json; `check_fingerprint` raises FINGERPRINT_MISMATCH for an encoder that
        isn't this model's."""
        self.template = template
        self.context_length = context_length
        tokens = family.special_tokens(config)
        self._image_token_id, self._placeholder_id = tokens.image_id, tokens.placeholder_id
        self._tokens_of = partial(family.tokens_per_grid, config)
        self._markers = partial(family.markers, config)
        self._taken = partial(getattr(family, "taken", lambda config, grid_thw, images: None), config)
        self._positions = partial(family.positions, config)
        self.has_laid_out = partial(getattr(family, "has_laid_out", lambda config, grid_thw: True), config)
        self._reads_text = bool(getattr(family, "reads_text", False))
        self._max_images = max_images
        self._check_fingerprint = check_fingerprint

    def build(
        self,
        messages: Sequence[Message],
        *,
        reserve: int = 1,
        salt: bytes = b"",
        special_tokens: bool = False,
        ending: Sequence[int] = (),
        rendering: Rendering = PLAIN,
    ) -> Prompt:
        """The prompt of a conversation, up to and with the header of the answer. Blocking: for a millisecond or so, if
        `is_short`; a text that fills the context takes some tenths of a second, and a longer one no more than that.

        `reserve` tokens must be left of the context; `salt`, `special_tokens`: see `ChatTemplate.ids`; `ending` are
        tokens behind the header. Raises INVALID_ARGUMENT, FINGERPRINT_MISMATCH or CONTEXT_LENGTH_EXCEEDED naming the
        field and the limit.
        """
        images = self._check(messages)
        self._check_size(sum(image.tokens for image in images), reserve)
        texts = [part for message in messages for part in message.parts if isinstance(part, str)]
        self.check_text(
            [
                *texts,
                *rendering.functions,
                rendering.arguments,
                *(call for message in messages for call in message.calls),
            ]
        )
        turns = [
            Turn(m.role, tuple(part if isinstance(part, str) else None for part in m.parts), m.calls) for m in messages
        ]
        token_ids = self.template.ids(turns, salt, special_tokens=special_tokens, rendering=rendering)
        prompt = self.laid_out([*token_ids, *ending], images, reserve)
        return replace(prompt, text=self.template.text(turns)) if self._reads_text else prompt

    def laid_out(self, ids: Sequence[int], images: Sequence[EmbeddingReference], reserve: int = 0) -> Prompt:
        """The prompt of these tokens, with a placeholder for each of the images. Raises INVALID_ARGUMENT or
        CONTEXT_LENGTH_EXCEEDED."""
        token_ids, spans = self._expand(ids, images)
        self._check_size(len(token_ids), reserve)
        layout = [(span.start, span.reference.grid_thw) for span in spans]
        positions, following = self._positions(len(token_ids), layout)
        return Prompt(tuple(token_ids), tuple(spans), positions, following)

    def is_short(self, messages: Sequence[Message]) -> bool:
        """`is_short`, and no image is of a size that the family has yet to lay out by work."""
        images = (part for message in messages for part in message.parts if isinstance(part, EmbeddingReference))
        return is_short(messages) and all(self.has_laid_out(image.grid_thw) for image in images)

    def _check(self, messages: Sequence[Message]) -> list[EmbeddingReference]:
        if not messages:
            raise invalid("messages must not be empty", param="messages")
        images: list[EmbeddingReference] = []
        for i, message in enumerate(messages):
            if message.role not in ROLES:
                raise invalid(
                    f"messages[{i}].role must be one of {', '.join(ROLES)}, got {message.role[:32]!r}",
                    param=f"messages[{i}].role",
                )
            if not message.parts and not message.calls:
                raise invalid(f"messages[{i}] has no parts", param=f"messages[{i}].parts")
            images += [part for part in message.parts if isinstance(part, EmbeddingReference)]
        self.check_images(images)
        return images

    def check_images(self, images: Sequence[EmbeddingReference]) -> None:
        """Raise for too many, and for those that are not of this model."""
        if len(images) > self._max_images:
            raise invalid(f"a prompt may hold {self._max_images} images, got {len(images)}", param="messages")
        for image in images:
            image.check(self._tokens_of)
            self._check_fingerprint(image)

    def _check_size(self, tokens: int, reserve: int) -> None:
        if tokens + reserve > self.context_length:
            raise LookonceError(
                ErrorKind.CONTEXT_LENGTH_EXCEEDED,
                f"the prompt has {tokens} tokens and needs room for {reserve} more, "
                f"the context holds {self.context_length}: send less text, or fewer or smaller images",
                param="messages",
            )

    def check_text(self, texts: Sequence[str]) -> None:
        """Raise for text that is far beyond the context, before all of it is tokenised."""
        characters = sum(map(len, texts))
        if characters <= self.context_length:  # not worth looking at twice
            return
        enough = self.context_length + self.context_length // _MARGIN
        if self.template.count(texts, enough) > enough:
            raise LookonceError(
                ErrorKind.CONTEXT_LENGTH_EXCEEDED,
                f"the text has {characters} characters, which are more than {enough} tokens; "
                f"the context holds {self.context_length}: send less text",
                param="messages",
            )

    def _expand(self, ids: Sequence[int], images: Sequence[EmbeddingReference]) -> tuple[list[int], list[ImageSpan]]:
        places = ids.count(self._placeholder_id)
        if places != len(images):
            raise invalid(
                f"the model's chat template made {places} placeholders for {len(images)} images; it takes images "
                "in user messages only",
                param="messages",
            )
        expanded: list[int] = []
        spans: list[ImageSpan] = []
        begin = 0
        for image in images:
            place = ids.index(self._placeholder_id, begin)
            expanded += ids[begin:place]
            rows, markers = self._taken(image.grid_thw, len(images)) or (None, self._markers(image.grid_thw))
            span = ImageSpan(len(expanded), image, markers, rows)
            expanded += [self._image_token_id] * (span.end - span.start)
            for at, token_id in span.markers:
                expanded[span.start + at] = token_id
            spans.append(span)
            begin = place + 1
        expanded += ids[begin:]
        return expanded, spans


class ChatTemplate:
    """Tokenises conversations. Safe to use from several threads."""

    def __init__(self, chat: ChatFormat, *, begins_anew: bool = False) -> None:
        """`begins_anew`: what follows the first tokens that the template writes is tokenised as a text of its own."""
        self.chat = chat
        self._begins_anew = begins_anew
        tokenizer = chat.tokenizer
        self._tokenizer = tokenizer
        starts = "|".join(sorted({re.escape(token[0]) for token in chat.added})) or "(?!)"
        self._starts = re.compile(starts)
        typed = sorted(chat.added.keys() - chat.structure, key=len, reverse=True)
        self._typed_or_starts = re.compile("|".join([*map(re.escape, typed), f"({starts})"]))
        added = tokenizer.get_added_tokens_decoder()
        special_ids = [number for number, token in added.items() if token.special]
        names = {number: token.content for number, token in added.items()}
        kind = {"byte_level": is_byte_level(tokenizer), "spaced": drops_first_space(tokenizer)}
        self.table = TokenTable.of(tokenizer.get_vocab(), names, special_ids, **kind)
        self._remembered = lru_cache(maxsize=_REMEMBERED)(self._ids)
        self._choices = lru_cache(maxsize=_REMEMBERED)(lambda text, salt: tuple(self.text_ids(text)))

    def ids(
        self,
        turns: Sequence[Turn],
        salt: bytes = b"",
        *,
        special_tokens: bool = False,
        rendering: Rendering = PLAIN,
    ) -> list[int]:
        """Token ids of the conversation and of the header of the answer; one placeholder token per image. What is
        remembered from an earlier call is so among callers of one salt: the time it takes tells others nothing.
        `special_tokens`: those that a text spells are tokens, unless they structure prompts (`ChatFormat.structure`).

        Raises INVALID_ARGUMENT when the checkpoint's template refuses the messages.
        """
        texts = chain(
            rendering.functions, (rendering.arguments,), *((*filter(None, turn.parts), *turn.calls) for turn in turns)
        )
        ids = self._remembered if sum(map(len, texts)) <= _REMEMBERED_CHARACTERS else self._ids
        return list(ids(tuple(turns), salt, special_tokens, rendering))

    def text(self, turns: Sequence[Turn]) -> str:
        """The conversation's text without images and what else the template writes as special tokens. Raises as `ids`
        does."""
        mark = self._mark(turns)
        pieces = self.chat.pieces(self._rendered(turns, mark, self._starts))
        return "".join(piece.replace(mark, "") for piece in pieces if isinstance(piece, str))

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

    def _ids(self, turns: Sequence[Turn], salt: bytes, special_tokens: bool, rendering: Rendering) -> tuple[int, ...]:
        mark = self._mark(turns, (*rendering.functions, rendering.arguments))
        breaks = self._typed_or_starts if special_tokens else self._starts
        rendered = self._rendered(turns, mark, breaks, rendering)
        lead = self.chat.lead if self.chat.lead and not self.chat.begins(rendered) else ()
        pieces = list(self.chat.pieces(rendered))
        begun = next((at for at, piece in enumerate(pieces) if isinstance(piece, str) and piece), 0)
        first = begun if self._begins_anew else 0
        encoded = (self._encode(piece, mark, first=at == first) for at, piece in enumerate(pieces))
        return (*lead, *chain.from_iterable(encoded))

    def _rendered(self, turns: Sequence[Turn], mark: str, breaks: re.Pattern[str], rendering: Rendering = PLAIN) -> str:
        """By the template; wherever a special token could begin, also one that goes on in the next part, the mark
        breaks it."""
        marked = [
            Turn(
                turn.role,
                tuple(part and _marked(part, breaks, mark) for part in turn.parts),
                tuple(json.dumps(_marked_json(call, breaks, mark), ensure_ascii=False) for call in turn.calls),
            )
            for turn in turns
        ]
        try:
            functions = [_marked_json(function, breaks, mark) for function in rendering.functions]
            arguments = _marked_json(rendering.arguments or "{}", breaks, mark)
            text = self.chat.render(marked, functions, arguments, header=rendering.header and not rendering.goes_on)
        except TemplateRefusal as error:
            raise invalid(
                "messages: the model's chat template refuses this order of roles", param="messages"
            ) from error
        return _until_last(text, marked[-1]) if rendering.goes_on else text

    def text_ids(self, text: str) -> list[int]:
        """Token ids of plain text, special tokens spelt in it included as text. Other threads go on meanwhile, unless
        it is brief: the library's `encode` keeps Python's lock, its `encode_batch_fast` does not."""
        if len(text) <= _BRIEF:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def continued_ids(self, text: str) -> list[int]:
        """`text_ids` of text behind other text."""
        if self.chat.continued is self._tokenizer:
            return self.text_ids(text)
        return self.chat.continued.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def choice_ids(self, text: str, salt: bytes = b"") -> tuple[int, ...]:
        """`text_ids` of a short text that is likely to be asked for again by callers of the same salt."""
        return self._choices(text, salt)

    def word_ids(self, word: str) -> set[tuple[int, ...]]:
        """The ways to write a short text within an answer: as it is, and behind a space."""
        plain = word.lstrip(" ")
        return {tuple(self.continued_ids(text)) for text in (plain, f" {plain}") if plain}

    def token_id(self, token: str) -> int | None:
        """The id of an added token, if the vocabulary has it."""
        return self.chat.added.get(token)

    def _mark(self, turns: Sequence[Turn], functions: Sequence[str] = ()) -> str:
        """A character that none of the texts holds."""
        used: set[str] = set()
        for part in chain(functions, *((*turn.parts, *turn.calls) for turn in turns)):
            used.update(_PRIVATE.findall(part or ""))
        mark = next((chr(code) for code in _PRIVATE_USE if chr(code) not in used), None)
        if mark is None:
            raise invalid("messages: the text uses every private-use character of Unicode", param="messages")
        return mark

    def _encode(self, piece: str | int, mark: str, *, first: bool) -> list[int]:
        if isinstance(piece, int):
            return [piece]
        text = piece.replace(mark, "")
        return self.text_ids(text) if first else self.continued_ids(text)


def _until_last(text: str, last: Turn) -> str:
    """A rendered conversation as far as the words of its last message. Raises INVALID_ARGUMENT where there are none."""
    words = last.parts[-1] if last.role == "assistant" and last.parts else None
    for said in (words, words and words.strip()):
        if said and said in text:
            return text[: text.rindex(said) + len(said)]
    raise invalid(
        "continue_final_message needs a last message of the assistant with text that the template keeps",
        param="continue_final_message",
    )


def _marked(text: str, breaks: re.Pattern[str], mark: str) -> str:
    """With a mark behind each match; of a pattern with a group, behind those of the group."""
    return breaks.sub(lambda match: match.group() + (mark if match.lastindex == (breaks.groups or None) else ""), text)


def _marked_json(text: str, breaks: re.Pattern[str], mark: str) -> Any:
    """The value of a JSON text, its strings as `_marked` makes them."""

    def marked(value: Any) -> Any:
        if isinstance(value, str):
            return _marked(value, breaks, mark)
        if isinstance(value, list):
            return [marked(each) for each in value]
        if isinstance(value, dict):
            return {marked(name): marked(each) for name, each in value.items()}
        return value

    return marked(json.loads(text))


def load_template(path: Path, family: Family, image: str = "") -> ChatTemplate:
    """The template and tokenizer of a checkpoint directory; `image` stands for an image where a template takes strings.

    CheckpointError naming what is missing."""
    chat = open_chat(path, family, image)
    return ChatTemplate(chat, begins_anew=getattr(family, "begins_anew", False))
