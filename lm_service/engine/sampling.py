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
import numpy.typing as npt
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
        counted = sorted(set(prompt_ids)) if sampling.repetition_penalty != 1.0 else []
        self.seen: npt.NDArray[np.int64] = np.array(counted, dtype=np.int64)  # of prompt and answer, if that matters
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
        if self.sampling.repetition_penalty != 1.0 and token_id not in self.seen:
            self.seen = np.append(self.seen, token_id)

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


def apply_penalties(scores: torch.Tensor, states: Sequence[SamplerState]) -> torch.Tensor:
    """Scores [rows, vocabulary] after the penalties of all rows, as a new tensor.

    Repetition (CTRL, arXiv:1909.05858) counts prompt and answer: positive logits are divided by it, negative ones
    multiplied. Presence is subtracted once from every token of the answer, frequency once per occurrence (OpenAI's
    definition).
    """
    scores = scores.clone()
    repeated = [(row, state) for row, state in enumerate(states) if state.sampling.repetition_penalty != 1.0]
    seen = [state.seen for _, state in repeated]
    if sum(map(len, seen)):
        factors = [state.sampling.repetition_penalty for _, state in repeated]
        rows, ids, factor = _columns(scores, [row for row, _ in repeated], seen, factors)
        values = scores[rows, ids]
        scores[rows, ids] = torch.where(values > 0, values / factor, values * factor)
    counted = [
        (row, state, np.fromiter(state.counts, dtype=np.int64, count=len(state.counts)))
        for row, state in enumerate(states)
        if state.counts and (state.sampling.presence_penalty or state.sampling.frequency_penalty)
    ]
    if counted:
        rows, ids, presence = _columns(
            scores,
            [row for row, _, _ in counted],
            [ids for _, _, ids in counted],
            [state.sampling.presence_penalty for _, state, _ in counted],
        )
        often = [
            state.sampling.frequency_penalty * np.fromiter(state.counts.values(), dtype=np.float32)
            for _, state, _ in counted
        ]
        scores[rows, ids] -= presence + torch.from_numpy(np.concatenate(often)).to(scores)
    return scores


def _columns(
    like: torch.Tensor, rows: Sequence[int], ids: Sequence[npt.NDArray[np.int64]], values: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each row's ids beside its number and its value."""
    lengths = [len(each) for each in ids]
    at = torch.from_numpy(np.repeat(np.array(rows, dtype=np.int64), lengths)).to(like.device)
    value = torch.from_numpy(np.repeat(np.array(values, dtype=np.float32), lengths))
    return at, torch.from_numpy(np.concatenate(ids)).to(like.device), value.to(like)


def steer(scores: torch.Tensor, states: Sequence[SamplerState]) -> torch.Tensor:
    """Scores [rows, vocabulary] with each request's biases, and without the tokens it does not want, as a new tensor.
    Where that leaves none, what it allows stays."""
    scores = scores.clone()
    for row, state in zip(scores, states, strict=True):
        wanted = state.sampling
        if wanted.bias:
            ids, biases = zip(*wanted.bias, strict=True)
            row[torch.tensor(ids, device=row.device)] += torch.tensor(biases, device=row.device, dtype=row.dtype)
        if wanted.allowed:
            kept = torch.tensor(wanted.allowed, device=row.device)
            values = row[kept]
            row.fill_(-torch.inf)[kept] = values
        barred = set(state.barred())
        if barred and not barred >= set(wanted.allowed or [-1]):
            row[torch.tensor(sorted(barred), device=row.device)] = -torch.inf
    return scores


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
    descending: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    rest: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits [rows, n], each row sorted descending, with what the filters leave out at -inf: all behind a first one.

    `top_k` (0: all), `top_p` and `min_p` are [rows], `rest` is log(sum(exp)) of the row's logits that are not given
    here. Top-p (arXiv:1904.09751) keeps the smallest set whose probability, of what top-k left, reaches it; min-p
    (arXiv:2407.01082) keeps what is at least that share of the best. One token always stays.
    """
    rank = torch.arange(descending.shape[-1], device=descending.device)
    limit = torch.where(top_k > 0, top_k, descending.shape[-1])[:, None]
    kept = descending.masked_fill(rank >= limit, -torch.inf)
    total = kept
    if rest is not None:
        total = torch.cat([kept, rest.masked_fill(top_k > 0, -torch.inf)[:, None]], dim=-1)
    probabilities = total.softmax(-1)[:, : descending.shape[-1]]
    before = probabilities.cumsum(-1) - probabilities
    out = (before >= top_p[:, None]) | (probabilities < min_p[:, None] * probabilities[:, :1])
    out[:, 0] = False
    return kept.masked_fill(out, -torch.inf)


@torch.inference_mode()
def sample(logits: torch.Tensor, states: Sequence[SamplerState]) -> list[int]:
    """One token for each row of logits [rows, vocabulary], which `constrain` may write over. The states' counts are
    left to the caller (`append`)."""
    scores = logits.float()
    if any(state.steered for state in states):
        scores = steer(scores, states)
    if any(state.penalised for state in states):
        scores = apply_penalties(scores, states)
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


_CANDIDATES = 1024
"""The best tokens of a row, among which filters nearly always leave all that is left: to sort a vocabulary takes longer
than a small model's step."""


def _draw(scores: torch.Tensor, states: Sequence[SamplerState], *, filtered: bool) -> torch.Tensor:
    """Inverse-transform sampling: one uniform number a row, so a seed means the same on every device."""
    uniform = _column(scores, [state.uniform() for state in states])
    if not filtered:
        return _picked(scores.double() / _temperatures(scores, states), uniform)
    if scores.shape[-1] <= _CANDIDATES:
        return _among(*scores.sort(dim=-1, descending=True, stable=True), states, uniform)[0]
    drawn, sure = _among(*_best(scores), states, uniform, scores)
    unsure = [row for row, is_sure in enumerate(sure.tolist()) if not is_sure]
    if unsure:
        at = torch.tensor(unsure, device=scores.device)
        order = scores[at].sort(dim=-1, descending=True, stable=True)
        drawn[at], _ = _among(*order, [states[row] for row in unsure], uniform[at])
    return drawn


def _best(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The best tokens of each row, descending, and their ids; of equals the lower id first, as by a stable sort."""
    ids = scores.topk(_CANDIDATES, sorted=False).indices.sort(-1).values
    descending, order = scores.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return descending, ids.gather(-1, order)


def _among(
    descending: torch.Tensor,
    ids: torch.Tensor,
    states: Sequence[SamplerState],
    uniform: torch.Tensor,
    scores: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token of each row that its filters leave among these, and whether that is sure: the filters leave out all
    others of `scores`, of which these are the best, and none is as good as the last that stays."""
    temperature, rest = _temperatures(descending, states), None
    if scores is not None and any(state.sampling.top_k == 0 for state in states):
        rest = (scores.scatter(-1, ids, -torch.inf).double() / temperature).logsumexp(-1)
    top_k = torch.tensor([state.sampling.top_k for state in states], device=descending.device)
    top_p = _column(descending, [state.sampling.top_p for state in states])
    min_p = _column(descending, [state.sampling.min_p for state in states])
    kept = filter_logits(descending.double() / temperature, top_k, top_p, min_p, rest)
    last = descending.gather(-1, kept.isfinite().sum(-1, keepdim=True).sub_(1).clamp_(min=0)).squeeze(-1)
    return ids.gather(-1, _picked(kept, uniform)[:, None]).squeeze(-1), (last > descending[:, -1]) & (
        top_k < descending.shape[-1]
    )


def _picked(scaled: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The place in each row [n] of the logits [rows, n] where the number [rows] falls."""
    cumulative = scaled.softmax(-1).cumsum(-1)
    target = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).clamp_(max=scaled.shape[-1] - 1).squeeze(-1)


def _temperatures(like: torch.Tensor, states: Sequence[SamplerState]) -> torch.Tensor:
    return _column(like, [state.sampling.temperature for state in states])[:, None]


def _column(like: torch.Tensor, values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, device=like.device, dtype=torch.float64)


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
