"""What the packed engine refuses: requests that can never fit or contradict themselves, embeddings it can't use."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lm_service.engine.packed.options import PackedOptions
from lm_service.engine.types import DamagedRecord, Generation, Prompt, Scoring
from lookonce.core.errors import ErrorKind, LookonceError, invalid
from lookonce.core.identity import EmbeddingReference
from lookonce.core.record import TensorView
from lookonce.models.tensors import tensor_of
from lookonce.models.text_adapter import ModelShape


def check_generation(request: Generation, context: int, shape: ModelShape, options: PackedOptions) -> None:
    """Raise INVALID_ARGUMENT or CONTEXT_LENGTH_EXCEEDED for what cannot be answered."""
    check_prompt(request.prompt, context, shape)
    for span in request.prompt.images:  # penalties count placeholders, too
        _check_tokens(request.prompt.token_ids[span.start : span.end], shape)
    if request.sampling.max_tokens < 1:
        raise invalid(f"max_tokens must be at least 1, got {request.sampling.max_tokens}", param="max_tokens")
    if not 1 <= request.sampling.n <= options.max_running:
        raise invalid(f"n must be between 1 and {options.max_running}, got {request.sampling.n}", param="n")


def check_scoring(request: Scoring, context: int, shape: ModelShape, options: PackedOptions) -> None:
    """Raise INVALID_ARGUMENT or CONTEXT_LENGTH_EXCEEDED for what cannot be scored."""
    for item in request.items:
        longest = max(map(len, item.choices), default=0)
        check_prompt(item.prompt, context - longest + 1, shape)
    for choices in {item.choices for item in request.items}:
        if not choices or not all(choices):
            raise invalid("choices must be given, and none of them empty", param="choices")
        if any(not 0 <= token < shape.vocabulary for choice in choices for token in choice):
            raise invalid(f"choices: a token id is outside the vocabulary of {shape.vocabulary}", param="choices")
        if sum(map(len, choices)) > options.slab_tokens // 4:
            raise invalid(f"choices must not exceed {options.slab_tokens // 4} tokens in all", param="choices")


def check_prompt(prompt: Prompt, context: int, shape: ModelShape) -> None:
    """Raise unless the prompt fits the context, its text the vocabulary, and its images agree with its tokens."""
    length = len(prompt.token_ids)
    if length >= context:
        raise LookonceError(
            ErrorKind.CONTEXT_LENGTH_EXCEEDED,
            f"the prompt has {length} tokens; with an answer, no more than {context} fit",
            param="prompt",
        )
    if not length:
        raise invalid("the prompt is empty", param="prompt")
    if prompt.positions.shape != (shape.position_rows, length):
        raise invalid(
            f"positions are {list(prompt.positions.shape)}, not [{shape.position_rows}, {length}]", param="prompt"
        )
    end = 0
    for span in prompt.images:
        if span.start < end or span.end >= length or span.reference.tokens < 1:
            raise invalid("images must not overlap, nor end the prompt", param="prompt")
        _check_tokens(prompt.token_ids[end : span.start], shape)
        _check_tokens([token_id for _, token_id in span.markers], shape)
        end = span.end
    _check_tokens(prompt.token_ids[end:], shape)


def _check_tokens(token_ids: Sequence[int], shape: ModelShape) -> None:
    if token_ids and (min(token_ids) < 0 or max(token_ids) >= shape.vocabulary):
        raise invalid(f"the prompt has a token id outside the vocabulary of {shape.vocabulary}", param="prompt")


def checked_rows(rows: torch.Tensor, reference: EmbeddingReference, shape: ModelShape) -> torch.Tensor:
    """What `rows_of` made, as [1 + deepstack, tokens, hidden]. Raises EMBEDDING_INVALID for rows of another shape than
    the prompt was laid out for."""
    stacked = rows if rows.dim() == 3 else rows[None]
    expected = [1 + shape.deepstack, reference.tokens, shape.hidden]
    if list(stacked.shape) != expected:
        raise LookonceError(
            ErrorKind.EMBEDDING_INVALID,
            f"the embedding is {list(rows.shape)}, expected {expected if shape.deepstack else expected[1:]}",
        )
    return stacked


def rows_of(*views: TensorView, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A record's rows in memory of their own: those of one tensor [tokens, hidden], of n [n, tokens, hidden]. Raises
    DamagedRecord when they are not finite in this dtype."""
    first, *further = (tensor_of(view).to(device=device, dtype=dtype, copy=len(views) == 1) for view in views)
    rows = torch.stack([first, *further]) if further else first
    if not bool(torch.isfinite(rows).all()):  # after the cast: float16 may overflow
        raise DamagedRecord("embedding holds numbers that are not finite")
    return rows
