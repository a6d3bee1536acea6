"""From logits to answers that are a token longer, and to scores."""

from __future__ import annotations

import torch

from lm_service.engine.packed.execution.batch import Batch, SuffixChunk
from lm_service.engine.packed.execution.choices import gather_logprobs
from lm_service.engine.packed.scheduling.sequence import Sequence
from lm_service.engine.sampling import finite_rows, sample, token_logprobs


def outputs(batch: Batch) -> list[tuple[SuffixChunk, int, int]]:
    """Chunks that want logits, with their rows [first, last) of them."""
    found, row = [], 0
    for chunk in batch.suffixes:
        count = chunk.count - chunk.first_output
        if count:
            found.append((chunk, row, row + count))
            row += count
    return found


def split_bad(
    wanted: list[tuple[SuffixChunk, int, int]], logits: torch.Tensor
) -> tuple[list[tuple[SuffixChunk, int, int]], list[Sequence]]:
    """Those with finite logits, and the sequences without."""
    finite = finite_rows(logits)
    if all(finite):
        return wanted, []
    good = [item for item in wanted if all(finite[item[1] : item[2]])]
    return good, [chunk.sequence for chunk, first, last in wanted if not all(finite[first:last])]


def extend_answers(wanted: list[tuple[SuffixChunk, int, int]], logits: torch.Tensor) -> list[Sequence]:
    """Sample the next token of every answer; the sequences that have one more."""
    chosen = [(chunk.sequence, row) for chunk, row, _ in wanted if chunk.sequence.answer is not None]
    if not chosen:
        return []
    states = [sequence.sampler for sequence, _ in chosen if sequence.sampler is not None]
    if len(chosen) < logits.shape[0]:
        logits = logits[torch.tensor([row for _, row in chosen], device=logits.device)]
    tokens = sample(logits, states)
    logprobs = token_logprobs(logits, tokens, states)
    for (sequence, _), state, token, logprob in zip(chosen, states, tokens, logprobs, strict=True):
        answer = sequence.answer
        if answer is None:
            continue
        answer.push(token, logprob)
        state.append(token)
        sequence.tokens.append(token)
        if len(answer.tokens) == 1:
            sequence.timings.ttft_ms = sequence.elapsed_ms()
        if answer.reason is not None:
            sequence.timings.total_ms = sequence.elapsed_ms()
    return [sequence for sequence, _ in chosen]


def extend_scores(wanted: list[tuple[SuffixChunk, int, int]], logits: torch.Tensor) -> list[Sequence]:
    """Add up the log-probabilities of choices; the sequences whose last row this was."""
    rows: list[int] = []
    places: list[tuple[Sequence, int]] = []
    for chunk, first, last in wanted:
        sequence = chunk.sequence
        if sequence.trie is None:
            continue
        # row of place -1 is the prompt's last token
        start = sequence.computed + chunk.first_output - sequence.prompt_length
        rows.extend(range(first, last))
        places.extend((sequence, start + offset) for offset in range(last - first))
    if not rows:
        return []
    if len(rows) < logits.shape[0]:
        logits = logits[torch.tensor(rows, device=logits.device)]
    targets = [sequence.trie.targets(place) if sequence.trie is not None else [] for sequence, place in places]
    for (sequence, place), values in zip(places, gather_logprobs(logits, targets), strict=True):
        if sequence.trie is not None:
            sequence.trie.add(sequence.sums, place, values)
    ended = (sequence for sequence, place in places if sequence.trie and place == len(sequence.trie.tokens) - 1)
    return list(dict.fromkeys(ended))
