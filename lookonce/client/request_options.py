"""What a caller may say about questions: sampling, choices, an id, progress. Field names are those of the API."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from lookonce.core.errors import invalid


class SamplingOptions(TypedDict, total=False):
    """How an answer is written; what is left out is the service's default (greedy)."""

    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    stop: str | list[str]


class QuestionOptions(SamplingOptions, total=False):
    """What else holds for questions on an image: instructions, and how many pixels are looked at."""

    system: str
    detail: Literal["low", "high", "auto"]


@dataclass(frozen=True, slots=True)
class Question:
    """One of many questions, with its own sampling; with `choices` it is answered by their probabilities.

    >>> Question("What does the sign say?", id="sign", sampling={"max_tokens": 20})
    >>> Question("Is it day?", choices=["yes", "no"])
    """

    text: str
    id: str | None = None
    choices: Sequence[str] | None = None
    sampling: SamplingOptions = field(default_factory=lambda: SamplingOptions())

    def to_json(self, identifier: str) -> dict[str, Any]:
        """As the API takes it, under an id of the client's own."""
        json: dict[str, Any] = {"id": identifier, "text": self.text, **without_none(self.sampling)}
        if self.choices is not None:
            json["choices"] = list(self.choices)
        return json


def as_question(question: str | Question) -> Question:
    """Raises INVALID_ARGUMENT for anything but a string or a Question."""
    if isinstance(question, Question):
        return question
    if not isinstance(question, str):
        raise invalid(f"a question must be a string or a Question, not {type(question).__name__}", param="questions")
    return Question(question)


def without_none(options: Mapping[str, Any]) -> dict[str, Any]:
    """Only what was said: None means the default."""
    return {name: value for name, value in options.items() if value is not None}


Progress = bool | Callable[[int, int], object]
"""True: a bar on stderr. A function: called with how many are done, of how many."""


@contextmanager
def reporting(progress: Progress, total: int) -> Iterator[Callable[[int], object]]:
    """What to call with the count of answers that are there."""
    if callable(progress):
        yield lambda done: progress(done, total)
    elif progress:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Bar(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("questions", total=total)
            yield lambda done: bar.update(task, completed=done)
    else:
        yield lambda done: None
