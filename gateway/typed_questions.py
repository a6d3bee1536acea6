"""Questions of closed types: one of some options, yes or no, a place on a scale, some of many labels. Each becomes
prompts whose continuations are scored together, and their probabilities become its answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from gateway.answers import usage
from gateway.conversation import ChoiceQuestion, Turn
from protos.lookonce.v1 import language_pb2

YES, NO = ("yes", "Yes"), ("no", "No")
"""The ways in which each is written: their probabilities count together."""
LABEL = "{label}"
"""In the text of a many-of question: where the label goes. Without it, it goes on a line below."""
MAX_ORDERS = 8
MAX_PROMPTS = 1024  # of a call
Scores = Sequence[language_pb2.ItemScores]
Prompt = Callable[[str], tuple[Turn, ...]]


@dataclass(frozen=True)
class ClosedQuestion:
    """Prompts with continuations, and what their scores answer."""

    type: str
    id: str
    items: tuple[ChoiceQuestion, ...]
    answer: Callable[[Scores], dict[str, Any]]

    def fields(self, scores: Scores) -> dict[str, Any]:
        """Of the answer."""
        cost = language_pb2.Usage(
            prompt_tokens=sum(one.usage.prompt_tokens for one in scores),
            cached_tokens=sum(one.usage.cached_tokens for one in scores),
            image_tokens=max(one.usage.image_tokens for one in scores),
        )
        asked = {"prompts": len(scores)} if len(scores) > 1 else {}
        return {"type": self.type, **self.answer(scores), "finish_reason": "stop", **asked, "usage": usage([cost])}


class Asking:
    """Makes the closed questions about one thing."""

    def __init__(self, prompt: Prompt, *, special_tokens: bool = False) -> None:
        """`prompt` makes the conversation of a question's text."""
        self._prompt, self._special_tokens = prompt, special_tokens

    def choice(self, name: str, text: str, options: Sequence[str], *, tell: bool, orders: int = 1) -> ClosedQuestion:
        """One of these. `tell` writes them below the question; with more than one order they are told in as many, and
        probabilities are averaged: what stands first is favoured in none."""
        turns = range(min(orders, len(options), MAX_ORDERS))
        told = [told_options(text, [*options[at:], *options[:at]]) for at in turns]
        items = [self._item(name, one, options) for one in (told if tell or orders > 1 else [text])]
        return ClosedQuestion("choice", name, tuple(items), partial(_chosen, tuple(options)))

    def yes_no(self, name: str, text: str, *, tell: bool, orders: int = 1) -> ClosedQuestion:
        """Whether it is so."""
        told = [f"{text}\nAnswer yes or no.", f"{text}\nAnswer no or yes."][:orders]
        texts = told if tell or orders > 1 else [text]
        return ClosedQuestion("yes_no", name, tuple(self._item(name, one, YES + NO) for one in texts), _truth)

    def rating(
        self, name: str, text: str, levels: Sequence[tuple[str, float]], *, tell: bool, orders: int = 1
    ) -> ClosedQuestion:
        """A place on a scale of labels, each with its value."""
        labels = [label for label, _ in levels]
        told = [told_options(text, labels), told_options(text, labels[::-1])][:orders]
        items = [self._item(name, one, labels) for one in (told if tell or orders > 1 else [text])]
        return ClosedQuestion("rating", name, tuple(items), partial(_rated, tuple(levels)))

    def many_of(self, name: str, text: str, labels: Sequence[str]) -> ClosedQuestion:
        """Each label by itself: is it so of this one?"""
        asked = [text.replace(LABEL, label) if LABEL in text else f"{text}\n{label}" for label in labels]
        items = tuple(self._item(name, one, YES + NO) for one in asked)
        return ClosedQuestion("many_of", name, items, partial(_many, tuple(labels)))

    def _item(self, name: str, text: str, options: Sequence[str]) -> ChoiceQuestion:
        return ChoiceQuestion(name, self._prompt(text), tuple(options), self._special_tokens)


def told_options(text: str, options: Sequence[str]) -> str:
    """The question, and what may be answered."""
    return f"{text}\nAnswer with one of: {', '.join(options)}."


def _averaged(scores: Scores) -> dict[str, float]:
    """The probability of each continuation, over all prompts."""
    sums: dict[str, float] = {}
    for one in scores:
        for item in one.choices:
            sums[item.choice] = sums.get(item.choice, 0.0) + item.probability / len(scores)
    return sums


def _chosen(options: Sequence[str], scores: Scores) -> dict[str, Any]:
    found = _averaged(scores)
    fields: dict[str, Any] = {"text": max(options, key=found.__getitem__), "choices": found}
    if len(scores) == 1:
        fields["logprobs"] = {item.choice: item.logprob for item in scores[0].choices}
    return fields


def _yes(scores: Scores) -> float:
    found = _averaged(scores)
    return sum(found[word] for word in YES)


def _truth(scores: Scores) -> dict[str, Any]:
    probability = _yes(scores)
    told = {"yes": probability, "no": 1 - probability}
    is_so = probability >= 0.5
    return {"text": "yes" if is_so else "no", "value": is_so, "probability": probability, "choices": told}


def _rated(levels: Sequence[tuple[str, float]], scores: Scores) -> dict[str, Any]:
    found = _averaged(scores)
    expected = sum(found[label] * value for label, value in levels)
    return {"text": max(found, key=found.__getitem__), "value": expected, "choices": found}


def _many(labels: Sequence[str], scores: Scores) -> dict[str, Any]:
    found = {label: _yes([one]) for label, one in zip(labels, scores, strict=True)}
    held = [label for label, probability in found.items() if probability >= 0.5]
    return {"text": ", ".join(held), "value": held, "labels": found}
