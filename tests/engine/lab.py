"""A small real model beside the engine: prompts with images, and what transformers alone makes of them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from lm_service.engine.answer import Answer, TokenTable
from lm_service.engine.packed.engine import PackedEngine
from lm_service.engine.packed.options import PackedOptions
from lm_service.engine.packed.prefix_cache.content import prompt_contents
from lm_service.engine.packed.scheduling.sequence import Request, Sequence
from lm_service.engine.sampling import SamplerState
from lm_service.engine.types import (
    Delta,
    EmbeddingSource,
    Finish,
    Generation,
    ImageSpan,
    Prompt,
    Sampling,
    ScoreItem,
    Scores,
    TokenLogprob,
)
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.identity import EmbeddingReference
from lookonce.models.checkpoint import Half, open_checkpoint
from lookonce.models.qwen2_vl.config import mrope_positions
from lookonce.models.qwen2_vl.text import Qwen2VLAdapter
from lookonce.models.tensors import view_of
from tests.modules import load_language_model

VOCABULARY = 512
PAD = 500  # stands for an image's placeholder
TOKENS = TokenTable([(i, bytes([97 + i % 26])) for i in range(VOCABULARY)])


def an_image(number: int, rows: int = 3, columns: int = 4) -> EmbeddingReference:
    """A reference to an image of rows x columns tokens."""
    key = number.to_bytes(32, "little")
    return EmbeddingReference(
        key=key,
        fingerprint="0" * 64,
        image_digest=bytes(31) + bytes([number % 256]),
        grid_thw=(1, 2 * rows, 2 * columns),
        tokens=rows * columns,
        width=columns * 28,
        height=rows * 28,
    )


def prompt(*parts: list[int] | EmbeddingReference) -> Prompt:
    """Text as token ids, and images."""
    ids: list[int] = []
    spans: list[ImageSpan] = []
    for part in parts:
        if isinstance(part, EmbeddingReference):
            spans.append(ImageSpan(len(ids), part))
            ids += [PAD] * part.tokens
        else:
            ids += part
    positions, following = mrope_positions(len(ids), [(span.start, span.reference.grid_thw) for span in spans], 2)
    return Prompt(tuple(ids), tuple(spans), positions, following)


def words(count: int, seed: int) -> list[int]:
    """So many token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, PAD, (count,), generator=generator).tolist()


class Album:
    """An EmbeddingLoader over made-up images: its loads are counted, and it may be told to wait or to fail."""

    def __init__(self, hidden: int) -> None:
        self._hidden = hidden
        self.loads: Counter[bytes] = Counter()
        self.lost: set[bytes] = set()
        self.gate: asyncio.Event | None = None
        self.as_records = False  # rows are made by the engine of a record's tensors, as a real loader has it

    def rows(self, reference: EmbeddingReference) -> torch.Tensor:
        generator = torch.Generator().manual_seed(int.from_bytes(reference.key[:7], "little"))
        return torch.randn(reference.tokens, self._hidden, generator=generator)

    async def load(self, reference: EmbeddingReference, rows_of: Any = None) -> tuple[Any, EmbeddingSource]:
        self.loads[reference.key] += 1
        if self.gate is not None:
            await self.gate.wait()
        await asyncio.sleep(0)
        if reference.key in self.lost:
            raise LookonceError(ErrorKind.EMBEDDING_MISSING, "the embedding is in no tier")
        rows = self.rows(reference)
        return rows_of(view_of(rows)) if self.as_records else rows, EmbeddingSource.STORE


class Lab:
    """A checkpoint's language half twice: in the engine, and as transformers runs it."""

    def __init__(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        checkpoint = open_checkpoint(str(path), needs=Half.LANGUAGE)
        self.adapter = Qwen2VLAdapter(*load_language_model(checkpoint, dtype))
        self.text_model, self.head = load_language_model(checkpoint, dtype)
        self.album = Album(self.adapter.shape.hidden)

    @contextlib.asynccontextmanager
    async def engine(self, *, end_ids: frozenset[int] = frozenset(), **options: Any):
        """A started engine; when it is closed, none of its memory may be in use."""
        options = {"kv_bytes": 4 << 20, "prefix_bytes": 4 << 20, "slab_tokens": 256, **options}
        self.album = Album(self.adapter.shape.hidden)
        engine = PackedEngine(self.adapter, TOKENS, end_ids, PackedOptions(**options))
        await engine.start(self.album)
        try:
            yield engine
            await drained(engine)
        finally:
            await engine.close()
        core = engine._core
        assert core.pool.used_slots == 0
        assert core.cache.bytes == 0 and len(core.cache) == 0
        assert not core.scheduler.prefills and not core.scheduler.running and not len(core.scheduler.queue)

    @torch.inference_mode()
    def logits(self, wanted: Prompt, answer: list[int] | tuple[int, ...] = ()) -> torch.Tensor:
        """[T, vocabulary] of prompt and answer, by transformers, alone and in one piece."""
        ids = torch.tensor([[*wanted.token_ids, *answer]])
        hidden = self.text_model.embed_tokens(ids)
        for span in wanted.images:
            hidden[0, span.start : span.end] = self.album.rows(span.reference).to(hidden.dtype)
        further = torch.arange(wanted.next_position, wanted.next_position + len(answer)).expand(3, -1)
        positions = torch.cat([torch.from_numpy(wanted.positions), further], dim=1)[:, None]
        out = self.text_model(inputs_embeds=hidden, position_ids=positions, use_cache=False).last_hidden_state
        return self.head(out)[0]

    def check(self, wanted: Prompt, answer: Answered, tolerance: float = 2e-4) -> None:
        """Every token's whole distribution equals that of transformers alone, and every token is its best."""
        expected = self.logits(wanted, answer.tokens).log_softmax(-1)[len(wanted.token_ids) - 1 : -1]
        assert len(expected) == len(answer.tokens) == len(answer.logprobs)
        for row, token, given in zip(expected, answer.tokens, answer.logprobs, strict=True):
            ids = torch.tensor([number for number, _ in given.top])
            values = torch.tensor([value for _, value in given.top])
            torch.testing.assert_close(values, row[ids], atol=tolerance, rtol=0)
            assert token == int(row.argmax())

    def check_scores(self, items: Iterable[ScoreItem], scores: Scores, tolerance: float = 4e-4) -> None:
        """Every choice's log-probability is that which transformers alone gives its tokens."""
        for item, sums in zip(items, scores.logprobs, strict=True):
            for choice, given in zip(item.choices, sums, strict=True):
                rows = self.logits(item.prompt, choice).log_softmax(-1)[len(item.prompt.token_ids) - 1 : -1]
                expected = sum(float(row[token]) for row, token in zip(rows, choice, strict=True))
                assert given == pytest.approx(expected, abs=tolerance)


class Answered:
    """What came out of one answer."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.logprobs: list[TokenLogprob] = []
        self.finish: Finish | None = None

    def take(self, event: Delta | Finish) -> None:
        if isinstance(event, Finish):
            assert self.finish is None
            self.finish = event
            return
        assert self.finish is None
        self.tokens += event.token_ids
        self.text += event.text
        self.logprobs += event.logprobs


def sequence(request: Request, wanted: Prompt, max_tokens: int) -> Sequence:
    """A greedy sequence as an `EngineCore` takes it."""
    sampling = Sampling(max_tokens)
    answer = Answer(0, sampling, TOKENS, frozenset(), 4000)
    state = SamplerState(sampling, wanted.token_ids)
    return Sequence(request, 0, wanted, *prompt_contents([wanted]), list(wanted.token_ids), answer, state)


def generation(wanted: Prompt, max_tokens: int = 4, **rest: Any) -> Generation:
    """A greedy request that reports the whole distribution of every token."""
    request = {key: rest.pop(key) for key in ("client", "deadline", "salt") if key in rest}
    return Generation("request", wanted, Sampling(max_tokens, **{"logprobs": VOCABULARY, **rest}), **request)


async def ask(engine: PackedEngine, request: Generation) -> list[Answered]:
    """The finished answers of a request, by index."""
    answers = [Answered() for _ in range(request.sampling.n)]
    async for event in engine.generate(request):
        answers[event.index].take(event)
    assert all(answer.finish is not None for answer in answers)
    return answers


async def drained(engine: PackedEngine) -> None:
    """Wait until nothing runs, waits or holds a slot."""
    end = time.monotonic() + 60
    while True:
        state = engine.describe()
        if not state.running and not state.waiting and not state.kv_slots:
            return
        assert time.monotonic() < end, f"the engine never came to rest: {state}"
        await asyncio.sleep(0.005)
