"""The check at start: whether the packed step of an embedding model computes what the half's weights say."""

from __future__ import annotations

import numpy as np
import structlog

from lm_service.engine.types import ImageSpan, Prompt
from lm_service.engine.vectors.forward import Filled, vectors_of
from lookonce.core.identity import DIGEST_BYTES, EmbeddingReference
from lookonce.models.checkpoint import Checkpoint
from lookonce.models.self_check import Exam, check_exam, check_language_vectors
from lookonce.models.text_adapter import ModelAdapter
from lookonce.models.vector_layout import Pooling

_log = structlog.get_logger(__name__)


def check_vectors(checkpoint: Checkpoint, model: ModelAdapter, pooling: Pooling, quantization: str) -> None:
    """Hold vectors of two prompts about one image, computed in one step, to the checkpoint's weights. Blocking. Raises
    SelfCheckFailed."""
    exam = check_exam(checkpoint, model.shape.vocabulary)

    def found() -> list[float]:
        vectors = vectors_of(model, pooling, _filled(model, exam))
        numbers: list[float] = np.concatenate([rows.ravel() for rows in vectors]).tolist()
        return numbers

    result = check_language_vectors(checkpoint, model.shape.dtype, quantization, pooling, exam, found)
    _log.info("language half checked", self_check=result)


def _filled(model: ModelAdapter, exam: Exam) -> list[Filled]:
    tokens = exam.rows.shape[1]
    reference = EmbeddingReference(bytes(DIGEST_BYTES), "", bytes(DIGEST_BYTES), exam.grid_thw, tokens, 0, 0)
    rows = exam.rows.to(device=model.shape.device, dtype=model.shape.dtype)
    return [
        Filled(
            Prompt(question.token_ids, (ImageSpan(1, reference),), question.positions, question.next_position), (rows,)
        )
        for question in exam.questions
    ]
