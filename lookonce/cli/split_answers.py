"""What the services of a running system say to images and questions, asked over gRPC: rows, tokens and scores."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lookonce.cli.rundir import RunningSystem
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.record import TensorView, parse_record, tensor_names
from lookonce.core.rpc.client import Encoded, LanguageClient, VisionClient
from protos.lookonce.v1 import language_pb2, vision_pb2

TOP = 20
"""Tokens whose log-probabilities are asked for in each place of an answer."""
_SECONDS = 3600.0


@dataclass
class Item:
    """A question about an image, and what the services say to it."""

    image: Path
    question: str
    choices: tuple[str, ...]
    tokens: list[int] = field(default_factory=list)  # of the greedy answer
    top: list[list[int]] = field(default_factory=list)  # the likeliest tokens in place of each
    top_logprobs: list[list[float]] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)  # log-probability of each choice


async def ask(
    system: RunningSystem, items: Sequence[Item], max_tokens: int, tell: Callable[[str], None]
) -> dict[Path, NDArray[np.float32]]:
    """Fill in the items; the rows of each image, [1 + deepstack, tokens, hidden]. Raises LookonceError."""
    vision = VisionClient(system.services["vision"]["address"])
    language = LanguageClient(system.services["language"]["address"])
    rows: dict[Path, NDArray[np.float32]] = {}
    encoded: dict[Path, Encoded] = {}
    try:
        for number, item in enumerate(items, 1):
            if item.image not in encoded:
                encoded[item.image], rows[item.image] = await _encode(vision, item.image)
            tell(f"the split model: question {number} of {len(items)}")
            reference = encoded[item.image].reference.to_proto()
            parts = [language_pb2.Part(image=reference), language_pb2.Part(text=item.question)]
            await _answer(language, item, [language_pb2.Message(role="user", parts=parts)], max_tokens)
    finally:
        await vision.close()
        await language.close()
    return rows


async def _encode(vision: VisionClient, image: Path) -> tuple[Encoded, NDArray[np.float32]]:
    request = vision_pb2.EncodeRequest(image=await asyncio.to_thread(image.read_bytes), with_tensors=True)
    encoded = await vision.encode(request, timeout=_SECONDS)
    if encoded.record is None:
        raise LookonceError(ErrorKind.INTERNAL, "the vision service sent no rows")
    tensors = parse_record(encoded.record, encoded.reference.key).tensors
    return encoded, np.stack([_numbers(tensors[name]) for name in tensor_names(len(tensors) - 1)])


async def _answer(language: LanguageClient, item: Item, messages: list[language_pb2.Message], max_tokens: int) -> None:
    sampling = language_pb2.SamplingParameters(
        max_tokens=max_tokens, temperature=0, repetition_penalty=1, logprobs=TOP, n=1
    )
    request = language_pb2.GenerateRequest(messages=messages, sampling=sampling)
    async for event in language.generate(request, timeout=_SECONDS):
        for given in event.delta.logprobs:
            item.tokens.append(given.token_id)
            item.top.append([each.token_id for each in given.top])
            item.top_logprobs.append([each.logprob for each in given.top])
    asked = language_pb2.ScoreItem(messages=messages, choices=item.choices)
    reply = await language.score(language_pb2.ScoreRequest(items=[asked]), timeout=_SECONDS)
    [result] = reply.results
    if result.HasField("error"):
        raise LookonceError(ErrorKind.INTERNAL, f"the choices of {item.question!r} could not be scored")
    item.scores = [choice.logprob for choice in result.scores.choices]


def _numbers(view: TensorView) -> NDArray[np.float32]:
    if view.dtype == "BF16":  # the upper half of a float32
        wide = np.frombuffer(view.data, dtype="<u2").astype("<u4") << 16
        return wide.view("<f4").reshape(view.shape)
    kind = {"F32": "<f4", "F16": "<f2"}[view.dtype]
    return np.frombuffer(view.data, dtype=kind).astype(np.float32).reshape(view.shape)
