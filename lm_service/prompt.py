"""From messages to an engine's Prompt: counts checked, placeholders expanded from the grids, positions laid out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, ParamSpec, TypeVar

from lm_service.engine.types import ImageSpan, Prompt
from lm_service.template import ChatTemplate, Turn
from lookonce.core.dtypes import SCHEMES
from lookonce.core.errors import ErrorKind, LookonceError, invalid
from lookonce.core.identity import EmbeddingReference
from lookonce.models.checkpoint import Checkpoint
from lookonce.models.checkpoint.checkpoint import COMPUTE_DTYPES
from lookonce.models.family import Family

P = ParamSpec("P")
T = TypeVar("T")
ROLES = ("system", "user", "assistant")
SHORT = 4096
"""Characters and image tokens, together, of a prompt that is built sooner (0.3 ms) than a thread could take it over."""
_MARGIN = 4
"""A text is refused by a count in pieces when that is over the context by more than one part in so many."""


@dataclass(frozen=True)
class Message:
    """One message of a conversation, its parts in order."""

    role: str
    parts: tuple[str | EmbeddingReference, ...]


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
    """The fingerprints of encoders whose embeddings this model takes, each 64 hexadecimal characters."""

    def __init__(self, fingerprints: Sequence[str]) -> None:
        self.fingerprints = tuple(fingerprints)

    @classmethod
    def of(cls, checkpoint: Checkpoint, encoder_dtype: str, encoder_quantization: str = "none") -> AcceptedEncoders:
        """Those derived from a checkpoint. `encoder_dtype` is a compute dtype, or "auto" for any;
        `encoder_quantization` is "none", or "int8" for weights in int8 on any device."""
        dtypes = COMPUTE_DTYPES if encoder_dtype == "auto" else (encoder_dtype,)
        ways = ("none",) if encoder_quantization == "none" else SCHEMES
        return cls([checkpoint.encoder_spec(dtype, way).fingerprint() for dtype in dtypes for way in ways])

    def check(self, reference: EmbeddingReference) -> None:
        """Raise FINGERPRINT_MISMATCH naming both sides unless the encoder is accepted."""
        if reference.fingerprint not in self.fingerprints:
            raise LookonceError(
                ErrorKind.FINGERPRINT_MISMATCH,
                f"the image was encoded by {reference.fingerprint[:64]!r}, this language model takes "
                f"{', '.join(self.fingerprints)}: the two services run different models or settings",
                param="image.fingerprint",
            )


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
        self._image_token_id = family.special_tokens(config).image_id
        self._tokens_of = partial(family.tokens_per_grid, config)
        self._markers = partial(family.markers, config)
        self._positions = partial(family.positions, config)
        self.has_laid_out = partial(getattr(family, "has_laid_out", lambda config, grid_thw: True), config)
        self._max_images = max_images
        self._check_fingerprint = check_fingerprint

    def build(self, messages: Sequence[Message], *, reserve: int = 1, salt: bytes = b"") -> Prompt:
        """The prompt of a conversation, up to and with the header of the answer. Blocking: for a millisecond or so, if
        `is_short`; a text that fills the context takes some tenths of a second, and a longer one no more than that.

        `reserve` tokens must be left of the context; `salt`: see `ChatTemplate.ids`. Raises INVALID_ARGUMENT,
        FINGERPRINT_MISMATCH or CONTEXT_LENGTH_EXCEEDED naming the field and the limit.
        """
        images = self._check(messages)
        self._check_size(sum(image.tokens for image in images), reserve)
        self._check_text(messages)
        turns = [Turn(m.role, tuple(part if isinstance(part, str) else None for part in m.parts)) for m in messages]
        token_ids, spans = self._expand(self.template.ids(turns, salt), images)
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
            if not message.parts:
                raise invalid(f"messages[{i}] has no parts", param=f"messages[{i}].parts")
            images += [part for part in message.parts if isinstance(part, EmbeddingReference)]
        if len(images) > self._max_images:
            raise invalid(f"a prompt may hold {self._max_images} images, got {len(images)}", param="messages")
        for image in images:
            image.check(self._tokens_of)
            self._check_fingerprint(image)
        return images

    def _check_size(self, tokens: int, reserve: int) -> None:
        if tokens + reserve > self.context_length:
            raise LookonceError(
                ErrorKind.CONTEXT_LENGTH_EXCEEDED,
                f"the prompt has {tokens} tokens and needs room for {reserve} more, "
                f"the context holds {self.context_length}: send less text, or fewer or smaller images",
                param="messages",
            )

    def _check_text(self, messages: Sequence[Message]) -> None:
        """Raise for text that is far beyond the context, before all of it is tokenised."""
        texts = [part for message in messages for part in message.parts if isinstance(part, str)]
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
        places = ids.count(self._image_token_id)
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
            place = ids.index(self._image_token_id, begin)
            expanded += ids[begin:place]
            span = ImageSpan(len(expanded), image, self._markers(image.grid_thw))
            expanded += [self._image_token_id] * (span.end - span.start)
            for at, token_id in span.markers:
                expanded[span.start + at] = token_id
            spans.append(span)
            begin = place + 1
        expanded += ids[begin:]
        return expanded, spans
