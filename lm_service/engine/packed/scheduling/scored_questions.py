"""From items to be scored to sequences, and from those to their Scores."""

from __future__ import annotations

from collections.abc import Sequence as Sequences
from itertools import groupby

from lm_service.engine.packed.execution.choices import trie_of
from lm_service.engine.packed.prefix_cache.content import Head, PromptContent, prompt_contents
from lm_service.engine.packed.scheduling.prefix_policy import find_shared_ends
from lm_service.engine.packed.scheduling.sequence import Request, Sequence
from lm_service.engine.types import EmbeddingSource, ScoreItem, Scores, Scoring, Timings, by_images


def score_sequences(
    scoring: Scoring, *, exclusive: bool, worth: int, longest: int, prefix_reuse: bool = True
) -> list[Sequence]:
    """A sequence for each item, in order: those of one request, or (`exclusive`) of one for the items about the same
    images. Where at least `worth` tokens are spared, those that begin alike behind the same images share a prefix;
    questions of `longest` tokens or more don't take part. `prefix_reuse`: see `prompt_contents`."""
    placed: dict[int, Sequence] = {}
    for places in by_images(scoring.items) if exclusive else [range(len(scoring.items))]:
        request = Request(
            scoring.id,
            scoring.client,
            kept=False,
            isolated=scoring.isolated,
            exclusive=exclusive,
            salt=scoring.salt,
        )
        items = [scoring.items[place] for place in places]
        contents = prompt_contents((item.prompt for item in items), scoring.salt, prefix_reuse=prefix_reuse)
        request.sequences = [
            _sequence(request, index, item, content)
            for index, (item, content) in enumerate(zip(items, contents, strict=True))
        ]
        for head, alike in groupby(request.sequences, lambda sequence: sequence.content.head):
            _share_prefixes(head, [one for one in alike if one.content.length - head.length < longest], worth)
        placed.update(zip(places, request.sequences, strict=True))
    return [placed[place] for place in range(len(scoring.items))]


def _sequence(request: Request, index: int, item: ScoreItem, content: PromptContent) -> Sequence:
    trie = trie_of(item.choices)
    tokens, sums = [*item.prompt.token_ids, *trie.tokens], [0.0] * len(item.choices)
    return Sequence(request, index, item.prompt, content, tokens, trie=trie, sums=sums)


def _share_prefixes(head: Head, sequences: Sequences[Sequence], worth: int) -> None:
    if len(sequences) < 2:
        return
    begun: set[tuple[int, ...]] = set()
    rests = [sequence.prompt.token_ids[head.length :] for sequence in sequences]
    for sequence, rest, ends in zip(sequences, rests, find_shared_ends(rests, worth), strict=True):
        if ends:
            sequence.shared_ends = tuple(head.length + end for end in ends)
            sequence.follows = rest[: ends[0]] in begun
            begun.update(rest[:end] for end in ends)


def scores_of(sequences: Sequences[Sequence]) -> Scores:
    """The result, once all are scored."""
    each = [sequence.timings for sequence in sequences]
    slowest = max(each, key=lambda timings: timings.total_ms, default=Timings())
    return Scores(
        logprobs=tuple(tuple(sequence.sums) for sequence in sequences),
        cached_tokens=tuple(timings.cached_tokens for timings in each),
        timings=Timings(
            queue_ms=max((timings.queue_ms for timings in each), default=0.0),
            load_ms=max((timings.load_ms for timings in each), default=0.0),
            ttft_ms=slowest.ttft_ms,
            total_ms=slowest.total_ms,
            prefill_tokens=sum(timings.prefill_tokens for timings in each),
            cached_tokens=sum(timings.cached_tokens for timings in each),
            prefix_hit=bool(each) and all(timings.prefix_hit for timings in each),
            embedding=max(
                (timings.embedding for timings in each), key=list(EmbeddingSource).index, default=EmbeddingSource.NONE
            ),
        ),
    )
