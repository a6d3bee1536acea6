"""The checks at start: whether the packed step computes what the half's weights say, and whether a row of the engine's
products depends on how many rows there are."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import structlog
import torch

from lm_service.engine.packed.engine_core import EngineCore
from lm_service.engine.packed.options import PackedOptions
from lm_service.engine.packed.scheduling.batch import PrefixPrefill
from lm_service.engine.packed.scheduling.scored_questions import score_sequences
from lm_service.engine.types import EmbeddingSource, ImageSpan, Prompt, ScoreItem, Scoring
from lookonce.core.errors import LookonceError
from lookonce.core.identity import DIGEST_BYTES, EmbeddingReference
from lookonce.models.checkpoint import Checkpoint, Half
from lookonce.models.self_check import Exam, check_exam, check_half, plain_scores
from lookonce.models.text_adapter import ModelAdapter

_ASKED = ((4, 17), (33, 6), (4, 1))
"""Tokens of an image and of a question about it. Asked one by one, the last is a step of one row."""
_POOL_TOKENS, _SLAB_TOKENS, _STATES = 1024, 128, 16
_log = structlog.get_logger(__name__)


def check_language_half(checkpoint: Checkpoint, model: ModelAdapter, options: PackedOptions, quantization: str) -> None:
    """Hold the packed step, two questions behind one image prefix, to the checkpoint's weights. Blocking. Raises
    SelfCheckFailed, and RuntimeError for a question that can't be computed."""
    exam = check_exam(checkpoint, model.shape.vocabulary)
    found = check_half(
        checkpoint,
        Half.LANGUAGE,
        model.shape.dtype,
        quantization,
        found=lambda: _exam_scores(model, options, exam),
        by_plain=lambda plain: plain_scores(plain, exam),
    )
    _log.info("language half checked", self_check=found)


def _exam_scores(model: ModelAdapter, options: PackedOptions, exam: Exam) -> list[float]:
    tokens = exam.rows.shape[1]
    reference = EmbeddingReference(bytes(DIGEST_BYTES), "", bytes(DIGEST_BYTES), exam.grid_thw, tokens, 0, 0)
    items = [
        ScoreItem(
            Prompt(question.token_ids, (ImageSpan(1, reference),), question.positions, question.next_position),
            question.choices,
        )
        for question in exam.questions
    ]
    rows = exam.rows.to(device=model.shape.device, dtype=model.shape.dtype)
    with torch.inference_mode():
        return _scored(model, _small(model, options), [items], lambda _: rows)


def is_batch_invariant(model: ModelAdapter, options: PackedOptions) -> bool:
    """Whether questions about random embedding rows have the same log-probabilities, to the last bit, in one step and
    in steps of their own. Blocking: a few short forwards."""
    began = time.perf_counter()
    small, items = _small(model, options), _items(model)

    def rows_of(reference: EmbeddingReference) -> torch.Tensor:
        return _rows(model, reference)

    try:
        together = _scored(model, small, [items], rows_of)
        invariant = together == _scored(model, small, [[item] for item in items], rows_of)
    except Exception:  # noqa: BLE001 - a model that can't compute this says so again when it is asked
        _log.exception("the check of the engine's products failed")
        invariant = False
    _log.info("products checked", batch_invariant=invariant, ms=round((time.perf_counter() - began) * 1000, 1))
    return invariant


def _small(model: ModelAdapter, options: PackedOptions) -> PackedOptions:
    """The same engine with little memory."""
    pool, states = _POOL_TOKENS * model.shape.token_bytes, _STATES * model.shape.state_bytes
    return replace(
        options,
        kv_bytes=pool + 2 * states,
        prefix_bytes=pool + states,
        slab_tokens=_SLAB_TOKENS,
        batch_invariant=True,
    )


def _scored(
    model: ModelAdapter,
    options: PackedOptions,
    calls: Sequence[Sequence[ScoreItem]],
    rows_of: Callable[[EmbeddingReference], torch.Tensor],
) -> list[float]:
    """The sums of all choices, each call a request that begins when the one before it has ended."""
    wanted: list[PrefixPrefill] = []
    core = EngineCore(model, options, wanted.append)
    sums: list[float] = []
    for items in calls:
        scoring = Scoring("self-check", tuple(items), isolated=True)
        reuse = model.shape.prefix_reuse
        sequences = score_sequences(
            scoring, exclusive=False, worth=_POOL_TOKENS, longest=_POOL_TOKENS, prefix_reuse=reuse
        )
        request = sequences[0].request
        core.enqueue(request)
        while core.step() or wanted:
            for prefill in wanted:
                prefill.rows = [(span, rows_of(span.reference)) for span in prefill.node.images]
                core.scheduler.loaded(prefill, EmbeddingSource.NONE, 0.0)
            wanted.clear()
        if request.unfinished or any(isinstance(event, LookonceError) for _, event in core.events):
            raise RuntimeError("a question of the check was not answered")
        sums += [each for sequence in sequences for each in sequence.sums]
    return sums


def _items(model: ModelAdapter) -> list[ScoreItem]:
    return [
        ScoreItem(_prompt(model, tokens, length), ((0,), (1, 2) if length > 1 else (1,))) for tokens, length in _ASKED
    ]


def _prompt(model: ModelAdapter, tokens: int, length: int) -> Prompt:
    reference = EmbeddingReference(
        bytes([tokens]) * DIGEST_BYTES, "", bytes([tokens]) * DIGEST_BYTES, (1, 2, 2 * tokens), tokens, 0, 0
    )
    total = 1 + tokens + length
    generator = torch.Generator().manual_seed(total)
    ids = torch.randint(model.shape.vocabulary, (total,), generator=generator).tolist()
    ids[0] = 0  # all begin alike
    positions = np.tile(np.arange(total), (model.shape.position_rows, 1))
    return Prompt(tuple(ids), (ImageSpan(1, reference),), positions, total)


def _rows(model: ModelAdapter, reference: EmbeddingReference) -> torch.Tensor:
    generator = torch.Generator().manual_seed(reference.tokens)
    rows = torch.randn(1 + model.shape.deepstack, reference.tokens, model.shape.hidden, generator=generator)
    return rows.to(device=model.shape.device, dtype=model.shape.dtype)
