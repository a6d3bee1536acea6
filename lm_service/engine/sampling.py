"""From logits to tokens: penalties, temperature, filters, seeded draws and log-probabilities.

Functions on rows of logits; knows nothing of models or sequences beyond a row's `SamplerState`. Every row is drawn with
its own generator and by its own row alone, so that an answer does not depend on what else is in the batch. The order is
that of vLLM and transformers' processors: biases and barred tokens of the request, repetition penalty, presence and
frequency penalties, least tokens, its grammar, temperature, top-k, top-p and min-p.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from lm_service.engine.grammar import Masks, Matcher
from lm_service.engine.types import Sampling, TokenLogprob

_SEED_STRIDE = 0x9E3779B97F4A7C15  # the golden ratio: keeps the seeds of a request's n answers far apart
_SEED_MASK = (1 << 63) - 1


class SamplerState:
    """What one answer's draws depend on: its parameters, its random numbers, and the tokens so far."""

    def __init__(
        self, sampling: Sampling, prompt_ids: Sequence[int], index: int = 0, end_ids: Iterable[int] = ()
    ) -> None:
        """`index` tells the n answers to one prompt apart: with a seed, each has its own but repeatable draws. None of
        `end_ids` is drawn before `min_tokens` are."""
        self.sampling = sampling
        self.counts: Counter[int] = Counter()  # of generated tokens
        self.prompt: frozenset[int] = frozenset(prompt_ids) if sampling.repetition_penalty != 1.0 else frozenset()
        self.greedy = sampling.temperature == 0.0  # the most probable token is taken
        self.filtered = sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0  # some tokens are left out
        self.penalised = (  # earlier tokens change the logits
            sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0
        )
        ends = {*sampling.stop_ids, *(() if sampling.ignore_eos else end_ids)}
        self.early = sampling.min_tokens if ends else 0  # tokens left before which no end is drawn
        self.end_ids = sorted(ends) if self.early else []
        self.steered = bool(sampling.bias or sampling.allowed or sampling.bad_words)  # the request chooses among tokens
        self.matcher: Matcher | None = sampling.grammar.matcher() if sampling.grammar is not None else None
        self._tail: list[int] = []  # generated tokens that may begin a bad word
        self._longest = max((len(word) for word in sampling.bad_words), default=0)
        self._index = index
        self._generator: torch.Generator | None = None  # made for the first draw: greedy answers need none

    def append(self, token_id: int) -> None:
        """Count a generated token, where that matters."""
        if self.matcher is not None:
            self.matcher.take(token_id)
        self.early = max(0, self.early - 1)
        if self._longest > 1:
            self._tail = [*self._tail, token_id][1 - self._longest :]
        if self.penalised:
            self.counts[token_id] += 1

    @property
    def complete(self) -> bool:
        """Whether the answer is all that its grammar lets it be."""
        return self.matcher is not None and self.matcher.complete

    @property
    def failed(self) -> bool:
        """Whether its grammar met a bound, so that the answer can't go on."""
        return self.matcher is not None and self.matcher.failed

    def forced(self, most: int) -> list[int]:
        """The next tokens, at most so many, where the grammar leaves no choice. None of an answer whose tokens'
        log-probabilities are wanted."""
        if self.matcher is None or self.sampling.logprobs is not None or self.steered or self.matcher.complete:
            return []
        return self.matcher.forced()[: max(0, most)]

    def barred(self) -> list[int]:
        """Tokens that would complete a bad word now."""
        words = self.sampling.bad_words
        return [word[-1] for word in words if len(word) == 1 or tuple(self._tail[1 - len(word) :]) == word[:-1]]

    def uniform(self) -> float:
        """The next number in [0, 1) of this answer."""
        if self._generator is None:
            self._generator = self._seeded()
        return float(torch.rand((), dtype=torch.float64, generator=self._generator))

    def _seeded(self) -> torch.Generator:
        generator = torch.Generator()
        if self.sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed((self.sampling.seed + self._index * _SEED_STRIDE) & _SEED_MASK)
        return generator


def apply_penalties(row: torch.Tensor, state: SamplerState) -> torch.Tensor:
    """Logits [vocabulary] after the penalties, as a new tensor.

    Repetition (CTRL, arXiv:1909.05858) counts prompt and answer: positive logits are divided by it, negative ones
    multiplied. Presence is subtracted once from every token of the answer, frequency once per occurrence (OpenAI's
    definition).
    """
    wanted = state.sampling
    row = row.clone()
    seen = sorted(state.prompt.union(state.counts)) if wanted.repetition_penalty != 1.0 else []
    if seen:
        ids = torch.tensor(seen, device=row.device)
        values = row[ids]
        factor = wanted.repetition_penalty
        row[ids] = torch.where(values > 0, values / factor, values * factor)
    if state.counts and (wanted.presence_penalty or wanted.frequency_penalty):
        ids = torch.tensor(list(state.counts), device=row.device)
        counts = torch.tensor(list(state.counts.values()), device=row.device, dtype=row.dtype)
        row[ids] -= wanted.presence_penalty + wanted.frequency_penalty * counts
    return row


def steer(row: torch.Tensor, state: SamplerState) -> torch.Tensor:
    """Logits [vocabulary] with the request's biases, and without the tokens it does not want, as a new tensor. Where
    that leaves none, what it allows stays."""
    wanted = state.sampling
    row = row.clone()
    if wanted.bias:
        ids, values = zip(*wanted.bias, strict=True)
        row[torch.tensor(ids, device=row.device)] += torch.tensor(values, device=row.device, dtype=row.dtype)
    if wanted.allowed:
        kept = torch.tensor(wanted.allowed, device=row.device)
        row = torch.full_like(row, -torch.inf).index_copy_(0, kept, row[kept])
    barred = set(state.barred())
    if barred and not barred >= set(wanted.allowed or [-1]):
        row[torch.tensor(sorted(barred), device=row.device)] = -torch.inf
    return row


def bar_ends(scores: torch.Tensor, states: Sequence[SamplerState]) -> torch.Tensor:
    """Scores [rows, vocabulary], as a new tensor, with the end tokens of answers that are too short yet at -inf."""
    scores = scores.clone()
    for row, state in zip(scores, states, strict=True):
        if state.early:
            row[torch.tensor(state.end_ids, device=row.device, dtype=torch.int64)] = -torch.inf
    return scores


def constrain(scores: torch.Tensor, logits: torch.Tensor, states: Sequence[SamplerState]) -> torch.Tensor:
    """Scores [rows, vocabulary] with the tokens that an answer's grammar does not let follow at -inf: the same tensor,
    written over, where nobody asks for log-probabilities of it. Where nothing is left of the scores, the logits decide
    among those that may follow. Where the model would end, and may not, what is open is closed
    (lm_service.engine.grammar)."""
    found = [(row, state, state.matcher) for row, state in enumerate(states) if state.matcher is not None]
    told = any(state.sampling.logprobs is not None for _, state, _ in found)
    if scores.data_ptr() == logits.data_ptr() and told:
        scores = scores.clone()
    words = torch.from_numpy(_MASKS.of([matcher for _, _, matcher in found])).to(scores.device)
    barred = _clear(words, scores.shape[-1])
    everybody = len(found) == len(states)
    at = torch.tensor([row for row, _, _ in found], device=scores.device)
    given, kept = (logits, scores) if everybody else (logits[at], scores[at])
    best = given.argmax(-1).tolist()
    if any(state.steered for _, state, _ in found):
        may_follow = given.float().masked_fill(barred, -torch.inf)
        kept = kept.masked_fill(barred, -torch.inf)
        kept = torch.where(kept.amax(-1, keepdim=True) == -torch.inf, may_follow, kept)
    else:
        kept = kept.masked_fill_(barred, -torch.inf)
    for place, ((_, _, matcher), token) in enumerate(zip(found, best, strict=True)):
        if token in matcher.end_ids and bool(barred[place, token]):
            closing = matcher.closing(lambda token, place=place: not barred[place, token])  # type: ignore[misc]
            if closing is not None:
                kept[place] = -torch.inf
                kept[place, closing] = 0.0
    return kept if everybody else scores.index_copy_(0, at, kept)


_MASKS = Masks(4)


def _clear(words: torch.Tensor, width: int) -> torch.Tensor:
    """Bool [rows, width]: which bits of int32 [rows, n], the lowest first, are not set; none is beyond 32 n."""
    if words.device.type == "cpu":
        bits = torch.from_numpy(np.unpackbits(words.numpy().view(np.uint8), axis=-1, bitorder="little"))
    else:
        shifts = torch.arange(32, dtype=torch.int32, device=words.device)
        bits = (words[:, :, None] >> shifts).bitwise_and_(1).to(torch.uint8).flatten(1)
    if bits.shape[-1] < width:
        bits = torch.nn.functional.pad(bits, (0, width - bits.shape[-1]))
    return bits[:, :width].bitwise_xor_(1).view(torch.bool)


def filter_logits(
    descending: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """Logits [rows, vocabulary], each row sorted descending, with what the filters leave out at -inf.

    `top_k` (0: all), `top_p` and `min_p` are [rows]. Top-p (arXiv:1904.09751) keeps the smallest set whose probability,
    of what top-k left, reaches it; min-p (arXiv:2407.01082) keeps what is at least that share of the best. One token
    always stays.
    """
    vocabulary = descending.shape[-1]
    rank = torch.arange(vocabulary, device=descending.device)
    limit = torch.where(top_k > 0, top_k, vocabulary)[:, None]
    kept = descending.masked_fill(rank >= limit, -torch.inf)
    probabilities = kept.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    out = (before >= top_p[:, None]) | (probabilities < min_p[:, None] * probabilities[:, :1])
    out[:, 0] = False
    return kept.masked_fill(out, -torch.inf)


@torch.inference_mode()
def sample(logits: torch.Tensor, states: Sequence[SamplerState]) -> list[int]:
    """One token for each row of logits [rows, vocabulary], which `constrain` may write over. The states' counts are left
    to the caller (`append`)."""
    scores = logits.float()
    if any(state.steered for state in states):
        rows = (steer(row, state) if state.steered else row for row, state in zip(scores, states, strict=True))
        scores = torch.stack(list(rows))
    if any(state.penalised for state in states):
        rows = (
            apply_penalties(row, state) if state.penalised else row for row, state in zip(scores, states, strict=True)
        )
        scores = torch.stack(list(rows))
    if any(state.early for state in states):
        scores = bar_ends(scores, states)
    if any(state.matcher is not None for state in states):
        scores = constrain(scores, logits, states)
    chosen = scores.argmax(-1)
    for filtered in (False, True) if any(not state.greedy for state in states) else ():
        rows_at = [i for i, state in enumerate(states) if not state.greedy and state.filtered is filtered]
        if rows_at:
            at = torch.tensor(rows_at, device=scores.device)
            chosen[at] = _draw(scores[at], [states[i] for i in rows_at], filtered=filtered)
    tokens: list[int] = chosen.tolist()
    return tokens


def _draw(scores: torch.Tensor, states: Sequence[SamplerState], *, filtered: bool) -> torch.Tensor:
    """Inverse-transform sampling: one uniform number a row, so a seed means the same on every device."""

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, device=scores.device, dtype=torch.float64)

    temperature = column([state.sampling.temperature for state in states])
    order: torch.Tensor | None = None
    if filtered:  # in float32: the order is that of the quotients
        scores, order = scores.sort(dim=-1, descending=True, stable=True)
    scaled = scores.double() / temperature[:, None]
    if filtered:
        top_k = torch.tensor([state.sampling.top_k for state in states], device=scores.device)
        top_p = column([state.sampling.top_p for state in states])
        min_p = column([state.sampling.min_p for state in states])
        scaled = filter_logits(scaled, top_k, top_p, min_p)
    cumulative = scaled.softmax(-1).cumsum(-1)
    target = column([state.uniform() for state in states])[:, None] * cumulative[:, -1:]
    picked = torch.searchsorted(cumulative, target, right=True).clamp_(max=scaled.shape[-1] - 1)
    return (picked if order is None else order.gather(-1, picked)).squeeze(-1)


def finite_rows(logits: torch.Tensor) -> list[bool]:
    """Whether each row's best logit is a finite number; NaN spreads to the maximum, so False means a failed forward."""
    if math.isfinite(float(logits.sum())):  # almost always, and the cheapest to find out
        return [True] * logits.shape[0]
    finite: list[bool] = logits.amax(-1).isfinite().tolist()
    return finite


def token_logprobs(
    logits: torch.Tensor, tokens: Sequence[int], states: Sequence[SamplerState]
) -> list[TokenLogprob | None]:
    """Log-probability of each row's token and of its best alternatives; None for rows that did not ask."""
    answers: list[TokenLogprob | None] = [None] * len(states)
    wanted = {i: state.sampling.logprobs for i, state in enumerate(states) if state.sampling.logprobs is not None}
    if not wanted:
        return answers
    rows = (logits if len(wanted) == len(states) else logits[torch.tensor(list(wanted), device=logits.device)]).float()
    rows = rows.log_softmax(-1)
    chosen = rows.gather(-1, torch.tensor([[tokens[i]] for i in wanted], device=rows.device)).squeeze(-1).tolist()
    best, best_ids = (found.tolist() for found in rows.topk(min(max(wanted.values()), rows.shape[-1])))
    for at, (i, count) in enumerate(wanted.items()):
        top = tuple(zip(best_ids[at][:count], best[at][:count], strict=True))
        answers[i] = TokenLogprob(tokens[i], chosen[at], top)
    return answers
