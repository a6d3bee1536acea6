"""Embed: items to prompts in the form their model takes, prompts to the engine, vectors to the wire; what is wrong with
one item is told of that item."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lm_service.engine.types import Prompt, VectorEngine, VectorRequest
from lm_service.metrics import METRICS, TracePhases
from lm_service.prompt import SHORT, Message, PromptBuilder, PromptThread
from lm_service.wire import MAX_ITEMS, MAX_PARTS, MAX_TEXT_CHARACTERS, Replies, parts_of, usage
from lookonce.core.errors import ErrorKind, LookonceError, invalid
from lookonce.core.identity import EmbeddingReference
from lookonce.core.rpc.messages import to_proto
from lookonce.models.vector_layout import TokenVectors, VectorLayout
from protos.lookonce.v1 import language_pb2

Parts = Sequence[str | EmbeddingReference]


def no_embedding_model() -> LookonceError:
    """What a service that writes text says to Embed."""
    text = (
        "this model writes text and makes no vectors: start a language service of an embedding model (GME-Qwen2-VL, "
        "ColQwen2, or another with --task embed) and name it with --embed-lm of the gateway"
    )
    return LookonceError(ErrorKind.UNSUPPORTED, text, param="model")


class VectorPrompts:
    """Builds the prompts of one embedding model."""

    def __init__(self, builder: PromptBuilder, layout: VectorLayout) -> None:
        self.layout = layout
        self._builder = builder
        self._template = builder.template

    def build(self, parts: Parts, instruction: str | None, *, query: bool, salt: bytes = b"") -> Prompt:
        """The prompt of one item. Raises INVALID_ARGUMENT, FINGERPRINT_MISMATCH or CONTEXT_LENGTH_EXCEEDED."""
        if not parts:
            raise invalid("an input must hold a text or an image", param="input")
        tokens = self.layout.tokens
        if tokens is not None:
            return self._of_tokens(tokens, parts, instruction, query=query)
        said = self.layout.instruction if instruction is None else instruction
        messages = [Message("user", tuple(parts))]
        if said:
            messages.insert(0, Message("system", (said,)))
        return self._builder.build(messages, reserve=0, salt=salt, ending=self._ending)

    @cached_property
    def _ending(self) -> list[int]:
        number = self._template.token_id(self.layout.ending)
        return [] if number is None else [number]

    def _of_tokens(self, tokens: TokenVectors, parts: Parts, instruction: str | None, *, query: bool) -> Prompt:
        if instruction is not None:
            raise invalid("this model takes no instruction: leave it out", param="instruction")
        if len(parts) > 1:
            raise invalid(
                "this model makes vectors of one text or one image, not of both together: give each as an input of "
                "its own",
                param="input",
            )
        (part,) = parts
        if isinstance(part, EmbeddingReference):
            self._builder.check_images([part])
            return self._builder.laid_out(list(self._ids(tokens.image_prompt)), [part])
        self._builder.check_text([part])
        if not query:
            return self._builder.laid_out(self._template.text_ids(part), [])
        suffix = [number for piece in tokens.query_suffix for number in self._ids(piece)]
        return self._builder.laid_out([*self._template.text_ids(tokens.query_prefix + part), *suffix], [])

    def _ids(self, text: str) -> Iterator[int]:
        """Of a text of ours, whose special tokens are tokens."""
        for piece in self._template.chat.pieces(text):
            if isinstance(piece, int):
                yield piece
            else:
                yield from self._template.text_ids(piece)


@dataclass(frozen=True)
class _Asked:
    """An item that is fit to be computed, and its place among the results."""

    at: int
    prompt: Prompt


class VectorMaker:
    """Answers EmbedRequests."""

    def __init__(self, engine: VectorEngine, prompts: VectorPrompts, replies: Replies, digest: str) -> None:
        """`digest`: of the model (`VectorLayout.digest`)."""
        self._engine, self._prompts, self._replies, self._digest = engine, prompts, replies, digest

    def describe(self) -> language_pb2.VectorDescription:
        """For Describe."""
        layout = self._prompts.layout
        return language_pb2.VectorDescription(
            vector_model=self._digest,
            width=layout.width,
            of_tokens=layout.pooling == "tokens",
            any_width=layout.cuts == (),
            cuts=layout.cuts or (),
            instruction=layout.instruction,
        )

    async def embed(
        self, request: language_pb2.EmbedRequest, deadline: float, prompt_thread: PromptThread
    ) -> language_pb2.EmbedResponse:
        """Results in the order asked. Raises what concerns the whole request (OVERLOADED, DEADLINE_EXCEEDED)."""
        size = _checked_size(request.items)
        results = [language_pb2.EmbedResult() for _ in request.items]
        if size <= SHORT:
            asked = self._asked(request, results)
        else:
            asked = await prompt_thread.run(self._asked, request, results)
        trace_phases = TracePhases()
        name = request.request_id or uuid.uuid4().hex
        prompts = tuple(one.prompt for one in asked)
        made = await self._engine.embed(VectorRequest(name, prompts, request.client, deadline))
        trace_phases.scored(made.timings)
        for one, found in zip(asked, made.found, strict=True):
            if isinstance(found, LookonceError):
                results[one.at].error.CopyFrom(to_proto(found))
                continue
            rows, width = found.shape
            data = np.ascontiguousarray(found, dtype="<f4").tobytes()
            vectors = language_pb2.Vectors(rows=rows, width=width, data=data, usage=usage(one.prompt, 0, 0))
            results[one.at].vectors.CopyFrom(vectors)
        METRICS.prompt_tokens.inc(sum(len(prompt.token_ids) for prompt in prompts))
        METRICS.vectors.inc(sum(result.vectors.rows for result in results))
        receipt = self._replies.receipt(made.timings, prompts)
        return language_pb2.EmbedResponse(results=results, receipt=receipt, vector_model=self._digest)

    def _asked(self, request: language_pb2.EmbedRequest, results: Sequence[language_pb2.EmbedResult]) -> list[_Asked]:
        """The items that are fit; the errors of the others go into their results."""
        known: dict[bytes, EmbeddingReference] = {}
        asked: list[_Asked] = []
        for at, (item, result) in enumerate(zip(request.items, results, strict=True)):
            try:
                parts = parts_of(item.parts, f"items[{at}].parts", known)
                instruction = item.instruction if item.HasField("instruction") else None
                prompt = self._prompts.build(parts, instruction, query=item.query, salt=request.cache_salt)
            except LookonceError as error:
                result.error.CopyFrom(to_proto(error))
            else:
                asked.append(_Asked(at, prompt))
        return asked


def _checked_size(items: Sequence[language_pb2.EmbedItem]) -> int:
    """Characters and image tokens of all items. Raises for too many."""
    if not 1 <= len(items) <= MAX_ITEMS:
        raise invalid(f"items must be 1 to {MAX_ITEMS}, got {len(items)}", param="items")
    count = sum(len(item.parts) for item in items)
    if count > MAX_PARTS:
        raise invalid(f"items may hold {MAX_PARTS} parts in all, got {count}", param="items")
    characters = sum(len(item.instruction) + sum(len(part.text) for part in item.parts) for item in items)
    if characters > MAX_TEXT_CHARACTERS:
        raise LookonceError(
            ErrorKind.PAYLOAD_TOO_LARGE,
            f"items may hold {MAX_TEXT_CHARACTERS} characters in all, got {characters}: ask in several calls",
            param="items",
        )
    return characters + sum(part.image.tokens for item in items for part in item.parts)
