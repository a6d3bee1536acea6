"""Scores inputs against the policy: one call to the language service for each image or text, all rules in it, and one
for each follow-up question of a rule that fires.

What the answers mean is `lookonce.moderation.judging`'s to say."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gateway.answers import SLOWNESS, Answers, receipt
from gateway.conversation import Caller, ChoiceQuestion, ImagePart, Turn
from gateway.routing.variants import ServedModel
from lookonce.core.errors import LookonceError
from lookonce.core.tasks import end_tasks, start_task
from lookonce.moderation import judging
from lookonce.moderation.policy import InputType, Policy, Rule
from protos.lookonce.v1 import language_pb2

Item = str | ImagePart
_SUMS = ("prefill_tokens", "cached_tokens")
_LARGEST = ("encode_ms", "queue_ms", "ttft_ms")


@dataclass(frozen=True)
class Scores:
    """What one image or text scored, by rule id."""

    kind: InputType
    scores: dict[str, float]
    follow_ups: dict[str, str]
    receipt: dict[str, Any] | None  # None when no rule applies to the input


class Moderations:
    """Applies one policy."""

    def __init__(self, policy: Policy, answers: Answers, model: ServedModel, *, concurrency: int) -> None:
        self._policy = policy
        self._answers = answers
        self._model = model
        self._concurrency = concurrency

    async def moderate(self, inputs: Sequence[Sequence[Item]], caller: Caller) -> list[dict[str, Any]]:
        """A result for each input; an input is one or more images, within the policy's `max_pixels`, and texts that
        are judged together: each rule by its highest score. Raises the first failure."""
        gate = asyncio.Semaphore(self._concurrency)

        async def one(item: Item) -> Scores:
            async with gate:
                return await self._score(item, caller)

        tasks = [[start_task(one(item)) for item in items] for items in inputs]
        flat = [task for group in tasks for task in group]
        try:
            await asyncio.gather(*flat)
        finally:
            await end_tasks(*flat)
        return [result_of(self._policy, [task.result() for task in group]) for group in tasks]

    async def _score(self, item: Item, caller: Caller) -> Scores:
        kind: InputType = "image" if isinstance(item, ImagePart) else "text"
        rules = self._policy.of(kind, _size(item))
        if not rules:
            return Scores(kind, {}, {}, None)
        questions = [ChoiceQuestion(rule.id, self._turns(item, rule.ask(kind)), rule.choices) for rule in rules]
        outcomes, cost, resolved = await self._answers.score(questions, caller)
        scores = judging.scores(rules, map(_logprobs, outcomes))
        further = judging.following_up(rules, scores)
        follow_ups = {rule.id: await self._follow_up(rule, kind, item, caller) for rule in further}
        return Scores(kind, scores, follow_ups, receipt(resolved, cost, self._model.name))

    async def _follow_up(self, rule: Rule, kind: InputType, shown: Item, caller: Caller) -> str:
        sampling = language_pb2.SamplingParameters(max_tokens=rule.follow_up_tokens)
        (completion,), _ = await self._answers.complete(self._turns(shown, rule.ask_further(kind)), sampling, caller)
        return judging.follow_up_text(completion.text)

    def _turns(self, shown: Item, question: str) -> tuple[Turn, ...]:
        system = (Turn("system", (self._policy.system,)),) if self._policy.system else ()
        # What is judged comes first: all rules share its computation.
        first = shown if isinstance(shown, ImagePart) else f'Text:\n"""\n{shown}\n"""\n'
        return (*system, Turn("user", (first, question)))


def result_of(policy: Policy, scores: Sequence[Scores]) -> dict[str, Any]:
    """OpenAI's result object; beside it the highest severity flagged, follow-ups, and the receipt."""
    best = {rule.id: max((item.scores.get(rule.id, 0.0) for item in scores), default=0.0) for rule in policy.rules}
    verdict = judging.judge(policy.rules, best)
    types = {rule.id: sorted({item.kind for item in scores if rule.id in item.scores}) for rule in policy.rules}
    follow_ups: dict[str, list[str]] = {}
    for item in scores:
        for rule_id, text in item.follow_ups.items():
            follow_ups.setdefault(rule_id, []).append(text)
    return {
        "flagged": verdict.flagged,
        "categories": verdict.labels,
        "category_scores": best,
        "category_applied_input_types": types,
        "severity": verdict.severity,
        "follow_ups": follow_ups,
        "receipt": _merged([item.receipt for item in scores if item.receipt is not None]),
    }


def _logprobs(outcome: language_pb2.ItemScores | LookonceError) -> dict[str, float]:
    if isinstance(outcome, LookonceError):
        raise outcome
    return {choice.choice: choice.logprob for choice in outcome.choices}


def _size(item: Item) -> tuple[int, int] | None:
    """Width and height of an image, as far as they are known."""
    if not isinstance(item, ImagePart):
        return None
    reference = item.resolved.reference if item.resolved is not None else item.record.reference
    return (reference.width, reference.height) if reference is not None else None


def _merged(receipts: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """One receipt for several calls: tokens added up, the slowest time, a hit only where all hit."""
    if not receipts:
        return None
    merged = dict(receipts[0])
    outcomes = [item["embedding"] for item in receipts if item["embedding"] is not None]
    merged["embedding"] = max(outcomes, key=SLOWNESS.__getitem__, default=None)
    merged["prefix"] = "hit" if all(item["prefix"] == "hit" for item in receipts) else "miss"
    merged |= {name: sum(item[name] for item in receipts) for name in _SUMS}
    merged |= {name: max(item[name] for item in receipts) for name in _LARGEST}
    return merged
