"""A request in vLLM's words: tokens with images among them, and sampling parameters. Nothing is tokenised or processed
again: vLLM is given the very tokens that the prompt was laid out with."""

from __future__ import annotations

import json
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from vllm.inputs.engine import MultiModalInput, TokensInput, mm_input, tokens_input
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    MultiModalKwargsItems,
    PlaceholderRange,
)
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from lm_service.engine.grammar import Kind, Structure
from lm_service.engine.types import Sampling, TokenLogprob
from lm_service.engine.vllm.connector import FILE
from lookonce.models.row_files import RowFile

_SEED_STRIDE, _SEED_MASK = 0x9E3779B97F4A7C15, (1 << 63) - 1  # as lm_service.engine.sampling keeps n answers apart
_ON_CPU = MultiModalBatchedField(keep_on_cpu=True)


@dataclass(frozen=True)
class NamedImage:
    """Where an image stands in a prompt, the identifier vLLM knows it by, and where its rows are."""

    start: int
    tokens: int
    grid_thw: tuple[int, int, int]
    identifier: str
    file: RowFile


def engine_input(
    token_ids: Sequence[int], images: Sequence[NamedImage], salt: str | None
) -> MultiModalInput | TokensInput:
    """A prompt: KV is shared with prompts of the same tokens, identifiers and salt only."""
    ids = list(token_ids)
    if not images:
        return tokens_input(ids, cache_salt=salt)
    return mm_input(
        ids,
        MultiModalKwargsItems({"image": [_item(image) for image in images]}),
        {"image": [image.identifier for image in images]},
        {"image": [PlaceholderRange(image.start, image.tokens) for image in images]},
        cache_salt=salt,
    )


def _item(image: NamedImage) -> MultiModalKwargsItem:
    grid = torch.tensor(image.grid_thw, dtype=torch.int64)
    path = torch.tensor(list(image.file.path.encode()), dtype=torch.int64)
    fields = {"image_grid_thw": grid, FILE: path}
    return MultiModalKwargsItem({name: MultiModalFieldElem(data, _ON_CPU) for name, data in fields.items()})


def answer_params(sampling: Sampling, end_ids: Set[int], index: int, room: int) -> SamplingParams:
    """Those of answer `index`. Stop strings and whole characters are ours (lm_service.engine.answer): vLLM ends an
    answer at the tokens that end a turn and at its length only. A seed means the same on one kind of device only."""
    seed = None if sampling.seed is None else (sampling.seed + index * _SEED_STRIDE) & _SEED_MASK
    limit = min(sampling.max_tokens, room)
    params = SamplingParams(
        max_tokens=limit,
        min_tokens=min(sampling.min_tokens, limit),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        seed=seed,
        logprobs=sampling.logprobs,
        stop_token_ids=sorted({*sampling.stop_ids, *(() if sampling.ignore_eos else end_ids)}),
        logit_bias=dict(sampling.bias) or None,
        allowed_token_ids=list(sampling.allowed) or None,
        structured_outputs=None if sampling.grammar is None else _structured(sampling.grammar.structure),
        **_COMMON,
    )
    if sampling.bad_words:  # as tokens: vLLM would write the words in tokens in its own way
        params._bad_words_token_ids = [list(word) for word in sampling.bad_words]
    return params


def _structured(wanted: Structure) -> StructuredOutputsParams:
    """vLLM compiles the same structure by the same library (`structured_outputs_config`)."""
    if wanted.kind is Kind.CHOICES:
        return StructuredOutputsParams(choice=json.loads(wanted.source))
    return StructuredOutputsParams(**{_NAMES[wanted.kind]: wanted.source})


_NAMES = {Kind.JSON_SCHEMA: "json", Kind.REGEX: "regex", Kind.GRAMMAR: "grammar", Kind.TOOLS: "grammar"}


def score_params(tokens: Sequence[int]) -> SamplingParams:
    """For the log-probabilities of these tokens behind a prompt."""
    return SamplingParams(max_tokens=1, temperature=0.0, logprob_token_ids=list(tokens), **_COMMON)


_COMMON: dict[str, Any] = {"detokenize": False, "ignore_eos": True, "output_kind": RequestOutputKind.DELTA}


def token_logprob(token_id: int, found: dict[int, Any], wanted: int) -> TokenLogprob:
    """vLLM's log-probabilities at one place, the best `wanted` of them by rank."""
    best = sorted(found.items(), key=lambda entry: entry[1].rank)[:wanted]
    return TokenLogprob(token_id, found[token_id].logprob, tuple((token, value.logprob) for token, value in best))
