"""From rows to what the page shows, in one pass over any number of rows and bounded memory."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lookonce.moderation.batch.output_formats import FIRED, FOLLOW_UP, SCORE
from lookonce.moderation.batch.results import Results
from lookonce.moderation.batch.run_identity import Manifest
from lookonce.moderation.policy import Rule

BINS = 1000
"""Of a score's histogram: thresholds of the page move in steps of a thousandth, with exact counts."""
_EXAMPLES = 20  # of each kind of error
_MOST_TRACKED = 100_000  # repeated images counted


@dataclass
class RuleCounts:
    """Of one rule."""

    rule: Rule
    asked: int = 0
    fired: int = 0
    bins: np.ndarray[Any, np.dtype[np.int64]] = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))
    best: list[tuple[float, int]] = field(default_factory=list)  # heap of (score, -index)
    near: list[tuple[float, int]] = field(default_factory=list)  # just below the threshold


@dataclass
class Collected:
    """All the page needs but the images. `cards` are rows by index."""

    manifest: Manifest
    finished: bool = True
    rows: int = 0
    flagged: int = 0
    duplicates: int = 0
    left_out: int = 0  # rows and parts that are damaged
    rules: list[RuleCounts] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # kind -> (source, message)
    repeated: Counter[str] = field(default_factory=Counter)  # first source -> further copies
    cards: dict[int, dict[str, Any]] = field(default_factory=dict)


def collect(out: Path, gallery: int) -> Collected:
    """Read a result twice: once to count and to choose at most `gallery` images, once for their rows. Blocking.

    Raises NOT_FOUND when there is none."""
    results = Results.at(out)
    rules = results.manifest.policy.of("image")
    collected = Collected(results.manifest, results.finished, rules=[RuleCounts(rule) for rule in rules])
    room = max(1, gallery // max(1, len(rules)))
    for batch in results.batches():
        _count(collected, batch, room)
    wanted = _chosen(collected.rules, gallery)
    if wanted:
        collected.cards = {row["index"]: row for row in _rows(results.batches(), wanted)}
    collected.left_out = results.left_out
    return collected


def _count(collected: Collected, batch: pa.RecordBatch, room: int) -> None:
    collected.rows += batch.num_rows
    collected.flagged += batch.column("flagged").true_count
    indexes = batch.column("index").to_numpy()
    first = batch.column("duplicate_of").is_null().to_numpy(zero_copy_only=False)
    collected.duplicates += int(batch.num_rows - first.sum())
    for source in batch.column("duplicate_of").drop_null().to_pylist():
        if source in collected.repeated or len(collected.repeated) < _MOST_TRACKED:
            collected.repeated[source] += 1
    _count_errors(collected, batch)
    for counts in collected.rules:
        scores = batch.column(SCORE + counts.rule.id).to_numpy(zero_copy_only=False).astype(np.float64)
        known = ~np.isnan(scores)
        counts.asked += int(known.sum())
        counts.fired += batch.column(FIRED + counts.rule.id).true_count
        places = np.clip((scores[known] * BINS + 1e-6).astype(np.int64), 0, BINS - 1)
        counts.bins += np.bincount(places, minlength=BINS)
        above = known & first & (scores >= counts.rule.threshold)
        _keep(counts.best, scores[above], indexes[above], room)
        below = known & first & (scores < counts.rule.threshold)
        _keep(counts.near, scores[below], indexes[below], max(1, room // 4))


def _count_errors(collected: Collected, batch: pa.RecordBatch) -> None:
    kinds = batch.column("error")
    if kinds.null_count == batch.num_rows:
        return
    messages, sources = batch.column("error_message"), batch.column("source")
    for place, kind in enumerate(kinds.to_pylist()):
        if kind is not None:
            collected.errors[kind] += 1
            examples = collected.examples.setdefault(kind, [])
            if len(examples) < _EXAMPLES:
                examples.append((sources[place].as_py(), messages[place].as_py() or ""))


def _keep(heap: list[tuple[float, int]], scores: Any, indexes: Any, room: int) -> None:
    """The highest scores; of equal ones those that come first."""
    for score, index in zip(scores.tolist(), indexes.tolist(), strict=True):
        if len(heap) < room:
            heapq.heappush(heap, (score, -index))
        elif (score, -index) > heap[0]:
            heapq.heapreplace(heap, (score, -index))


def _chosen(rules: list[RuleCounts], gallery: int) -> set[int]:
    """The best of every rule, then what is just below the thresholds."""
    chosen: dict[int, None] = {}
    for heaps in ([counts.best for counts in rules], [counts.near for counts in rules]):
        for heap in heaps:
            for _, negative in sorted(heap, reverse=True):
                if len(chosen) < gallery:
                    chosen.setdefault(-negative)
    return set(chosen)


def _rows(batches: Iterator[pa.RecordBatch], wanted: set[int]) -> Iterator[dict[str, Any]]:
    for batch in batches:
        indexes = batch.column("index").to_numpy()
        for place in np.flatnonzero(np.isin(indexes, list(wanted))).tolist():
            yield batch.slice(place, 1).to_pylist()[0]


def card(row: dict[str, Any], rules: list[RuleCounts], image: str | None, copies: int) -> dict[str, Any]:
    """An image of the gallery; scores in the order of the rules."""
    follow_ups = {counts.rule.id: row.get(FOLLOW_UP + counts.rule.id) for counts in rules if counts.rule.follow_up}
    return {
        "source": row["source"],
        "width": row["width"],
        "height": row["height"],
        "image": image,
        "copies": copies,
        "scores": [row[SCORE + counts.rule.id] for counts in rules],
        "follow_ups": {rule: text for rule, text in follow_ups.items() if text},
    }
