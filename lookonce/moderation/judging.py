"""What a model's answers mean by a policy: scores, labels, severity.

Pure: the gateway and the batch command judge by it alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lookonce.moderation.policy import SEVERITIES, Rule, Severity


@dataclass(frozen=True)
class Verdict:
    """By rules that were asked."""

    labels: dict[str, bool]  # by rule id: whether it fired
    severity: Severity | None  # the highest of rules that fired

    @property
    def flagged(self) -> bool:
        return any(self.labels.values())


def score(rule: Rule, logprobs: Mapping[str, float]) -> float:
    """0 to 1, unrounded: the probability that one of the rule's positive choices is the answer.

    `logprobs` are the choices' log-probabilities under the model (natural, not normalised over the choices). Raises
    INTERNAL when a choice has none."""
    best = max(logprobs.values(), default=0.0)
    weights = {choice: math.exp(logprob - best) for choice, logprob in logprobs.items()}
    total = math.fsum(weights.values())  # whose order, unlike a sum's, changes no bit
    return rule.score({choice: weight / total for choice, weight in weights.items()})


def scores(rules: Sequence[Rule], logprobs: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """`score` of each rule, by its id."""
    return {rule.id: score(rule, each) for rule, each in zip(rules, logprobs, strict=True)}


def judge(rules: Iterable[Rule], scores: Mapping[str, float]) -> Verdict:
    """The verdict by those of `rules` that have a score."""
    asked = [rule for rule in rules if rule.id in scores]
    labels = {rule.id: rule.fires(scores[rule.id]) for rule in asked}
    fired = (rule.severity for rule in asked if labels[rule.id])
    return Verdict(labels, max(fired, key=SEVERITIES.index, default=None))


def following_up(rules: Iterable[Rule], scores: Mapping[str, float]) -> list[Rule]:
    """The rules that fired and ask further."""
    return [rule for rule in rules if rule.follow_up and rule.fires(scores[rule.id])]


def follow_up_text(text: str) -> str:
    """The answer to a follow-up question as results show it."""
    return text.strip()
