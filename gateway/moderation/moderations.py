"""Scores inputs against the policy: one call to the language service for each picture or text, all categories in it.

A score is the probability of the category's positive choice, normalised over its choices."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gateway.answers import Answers
from gateway.conversation import Asker, ChoiceQuestion, ImagePart, Turn
from gateway.moderation.policy import SEVERITIES, Category, InputType, Policy
from gateway.receipts import receipt
from gateway.served_model import ServedModel
from lookonce.errors import ErrorKind, LookonceError
from protos.lookonce.v1 import language_pb2

Item = str | ImagePart
_WORST = {"hit": 0, "coalesced": 1, "miss": 2}
_SUMS = ("prefill_tokens", "cached_tokens")
_LARGEST = ("encode_ms", "queue_ms", "ttft_ms")


@dataclass(frozen=True)
class Scores:
    """What one picture or text scored, by category id."""

    kind: InputType
    probabilities: dict[str, float]
    receipt: dict[str, Any] | None  # None when no category applies to the kind


class Moderations:
    """Applies one policy."""

    def __init__(self, policy: Policy, answers: Answers, model: ServedModel, *, concurrency: int) -> None:
        self._policy = policy
        self._answers = answers
        self._model = model
        self._concurrency = concurrency

    async def moderate(self, inputs: Sequence[Sequence[Item]], asker: Asker) -> list[dict[str, Any]]:
        """A result for each input; an input is one or more pictures and texts that are judged together: each category
        by its highest score. Raises the first failure."""
        gate = asyncio.Semaphore(self._concurrency)

        async def one(item: Item) -> Scores:
            async with gate:
                return await self._score(item, asker)

        tasks = [[asyncio.create_task(one(item)) for item in items] for items in inputs]
        flat = [task for group in tasks for task in group]
        try:
            await asyncio.gather(*flat)
        finally:
            for task in flat:
                task.cancel()
            await asyncio.gather(*flat, return_exceptions=True)
        return [result_of(self._policy, [task.result() for task in group]) for group in tasks]

    async def _score(self, item: Item, asker: Asker) -> Scores:
        kind: InputType = "image" if isinstance(item, ImagePart) else "text"
        categories = self._policy.of(kind)
        if not categories:
            return Scores(kind, {}, None)
        questions = [self._question(category, item, kind) for category in categories]
        outcomes, cost, resolved = await self._answers.score(questions, asker)
        probabilities: dict[str, float] = {}
        for category, outcome in zip(categories, outcomes, strict=True):
            if isinstance(outcome, LookonceError):
                raise outcome
            probabilities[category.id] = _positive(category, outcome)
        return Scores(kind, probabilities, receipt(resolved, cost, self._model.name))

    def _question(self, category: Category, item: Item, kind: InputType) -> ChoiceQuestion:
        system = (Turn("system", (self._policy.system,)),) if self._policy.system else ()
        # What is judged comes first: all categories share its computation.
        shown = item if isinstance(item, ImagePart) else f'Text:\n"""\n{item}\n"""\n'
        return ChoiceQuestion(category.id, (*system, Turn("user", (shown, category.ask(kind)))), category.choices)


def result_of(policy: Policy, scores: Sequence[Scores]) -> dict[str, Any]:
    """OpenAI's result object; beside it the highest severity flagged, and the receipt."""
    best = {
        category.id: max((item.probabilities.get(category.id, 0.0) for item in scores), default=0.0)
        for category in policy.categories
    }
    flags = {category.id: best[category.id] >= category.threshold for category in policy.categories}
    types = {
        category.id: sorted({item.kind for item in scores if category.id in item.probabilities})
        for category in policy.categories
    }
    severities = [category.severity for category in policy.categories if flags[category.id]]
    return {
        "flagged": any(flags.values()),
        "categories": flags,
        "category_scores": best,
        "category_applied_input_types": types,
        "severity": max(severities, key=SEVERITIES.index, default=None),
        "receipt": _merged([item.receipt for item in scores if item.receipt is not None]),
    }


def _merged(receipts: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """One receipt for several calls: tokens added up, the slowest time, a hit only where all hit."""
    if not receipts:
        return None
    merged = dict(receipts[0])
    outcomes = [item["embedding"] for item in receipts if item["embedding"] is not None]
    merged["embedding"] = max(outcomes, key=_WORST.__getitem__, default=None)
    merged["prefix"] = "hit" if all(item["prefix"] == "hit" for item in receipts) else "miss"
    merged |= {name: sum(item[name] for item in receipts) for name in _SUMS}
    merged |= {name: max(item[name] for item in receipts) for name in _LARGEST}
    return merged


def _positive(category: Category, scores: language_pb2.ItemScores) -> float:
    for choice in scores.choices:
        if choice.choice == category.positive:
            return min(1.0, max(0.0, choice.probability))
    raise LookonceError(ErrorKind.INTERNAL, "the language service left a choice out")
