"""Asks a running gateway, an `evaluate.AnswerMany`, and holds every answer against the unsplit model's."""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock

import lookonce
from lookonce.client.request_options import Question

from .answerers import LONGEST, Transformers
from .evaluate import Answer

YES_OR_NO = re.compile(r"\byes\b.*\bno\b", re.IGNORECASE)


class Gateway:
    """Greedy answers through REST: an image uploaded once, all its questions in one call, then erased again.

    Questions that name yes and no are weighed, too, in the same call.
    """

    def __init__(self, url: str, api_key: str | None = None):
        self.client = lookonce.Client(url, api_key)

    def __call__(self, image: bytes, questions: Sequence[str]) -> list[Answer]:
        kept = self.client.image(image)
        weighed = [text for text in questions if YES_OR_NO.search(text)]
        asked = [*questions, *(Question(text, choices=("yes", "no")) for text in weighed)]
        answers = kept.ask_many(asked, temperature=0, max_tokens=LONGEST)
        for answer in answers:
            if answer.error:
                raise answer.error
        scores = {text: answer.choices["yes"] for text, answer in zip(weighed, answers[len(questions) :], strict=True)}
        kept.delete()
        return [Answer(answer.text, scores.get(text)) for text, answer in zip(questions, answers, strict=False)]

    def converse(self, messages: list[dict]) -> str:
        """The reply to chat messages whose content is a string or a list of strings (text) and bytes (images)."""
        chat = [
            m | {"content": m["content"] if isinstance(m["content"], str) else [_part(p) for p in m["content"]]}
            for m in messages
        ]
        return self.client.chat(chat, temperature=0, max_tokens=LONGEST).text


def _part(piece: str | bytes) -> dict:
    if isinstance(piece, str):
        return {"type": "text", "text": piece}
    return {"type": "image_url", "image_url": {"url": "data:;base64," + base64.b64encode(piece).decode()}}


@dataclass
class Compared:
    """Passes questions on to a gateway and counts how many of its answers are the unsplit model's, word for word."""

    gateway: Gateway
    unsplit: Transformers
    asked: int = 0
    different: list[dict] = field(default_factory=list)
    lock: Lock = field(default_factory=Lock)  # plain transformers' tokenizer is not for several threads at once

    def __call__(self, image: bytes, questions: Sequence[str]) -> list[Answer]:
        answers = self.gateway(image, questions)
        said = [answer.text for answer in answers]
        with self.lock:
            alike = self.unsplit.would_say(image, questions, said)
            for question, text, same in zip(questions, said, alike, strict=True):
                if not same:  # then what it generates from nothing is the last word
                    self._compare(question, text, self.unsplit(image, [question])[0].text)
            self.asked += len(questions)
        return answers

    def converse(self, messages: list[dict]) -> str:
        text = self.gateway.converse(messages)
        with self.lock:
            self._compare(messages[-1]["content"][-1], text, self.unsplit.converse(messages))
            self.asked += 1
        return text

    def _compare(self, question: str | bytes, text: str, alone: str) -> None:
        if text != alone:
            self.different.append({"question": str(question)[:200], "gateway": text, "unsplit": alone})

    def summary(self) -> dict:
        return {"asked": self.asked, "different": len(self.different), "differences": self.different[:20]}
