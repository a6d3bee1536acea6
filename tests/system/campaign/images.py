"""The images of a campaign, what the quiet system says of each, and whether the system must still have it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from tests.system.campaign.verdicts import Verdicts
from tests.system.cluster import System
from training.shapes.scenes import draw

FIRST_SEED = 9_000_000  # beyond those of training
OPEN = ("Describe the image.", "How many shapes are there?", "What is the biggest shape?")
CHOICES = (("Is there a star?", ("yes", "no")), ("How many shapes are there?", ("1", "2", "3", "4", "5", "6")))
MAX_TOKENS = 40
NEAR = 1e-3
"""How far probabilities may differ: what else is in a batch may change last digits."""
SEEN_EVERYWHERE = 1.6
"""Seconds after an upload until every gateway knows of it: records, tombstones too, are cached for one."""


@dataclass
class Sample:
    """One image, and its truth."""

    name: str  # its alias
    data: bytes
    churned: bool  # deleted and uploaded again by and by
    id: str = ""
    texts: dict[str, str] = field(default_factory=dict)  # by question of OPEN
    scores: dict[str, dict[str, float]] = field(default_factory=dict)  # by question of CHOICES
    certain_from: float = float("inf")  # requests that begin from then on must find it
    lost_until: float = 0.0  # what was uploaded before that may be gone
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)

    def uploaded(self, start: float, end: float, verdicts: Verdicts) -> None:
        """An upload was confirmed."""
        if start > self.lost_until and verdicts.store_was_whole(start, end):
            self.certain_from = min(self.certain_from, end + SEEN_EVERYWHERE)

    def may_be_gone(self, until: float) -> None:
        """What was uploaded before `until` may be."""
        self.certain_from, self.lost_until = float("inf"), until

    def is_text(self, question: str, text: str, *, whole: bool = True) -> bool:
        """Whether the text is the quiet system's; a part of it, if it was cut."""
        return text == self.texts[question] if whole else self.texts[question].startswith(text)

    def is_score(self, question: str, probabilities: dict[str, float]) -> bool:
        """Whether the probabilities are the quiet system's."""
        true = self.scores[question]
        return true.keys() == probabilities.keys() and all(abs(probabilities[c] - true[c]) < NEAR for c in true)


def questions() -> list[dict[str, Any]]:
    """All of them, as the API takes them."""
    weighed = [{"id": f"c{n}", "text": text, "choices": list(choices)} for n, (text, choices) in enumerate(CHOICES)]
    return [{"id": f"o{n}", "text": text, "max_tokens": MAX_TOKENS} for n, text in enumerate(OPEN)] + weighed


def prepare(system: System, count: int) -> list[Sample]:
    """`count` images with pairwise different descriptions, pinned and named, their truth learned from `system`."""
    images: list[Sample] = []
    seed = FIRST_SEED
    while len(images) < count:
        image = Sample(f"image-{len(images)}", draw(seed).png(), churned=len(images) % 3 == 0)
        seed += 1
        form = {"pinned": "true", "alias": image.name}
        reply = system.http.post("/v1/images", files={"file": image.data}, data=form)
        assert reply.status_code in (200, 201), reply.text
        image.id = reply.json()["id"]
        for answer in system.ask(image.id, questions(), temperature=0):
            kind, number = answer["id"][0], int(answer["id"][1:])
            if kind == "o":
                image.texts[OPEN[number]] = answer["text"]
            else:
                image.scores[CHOICES[number][0]] = answer["choices"]
        if all(image.texts[OPEN[0]] != other.texts[OPEN[0]] for other in images):
            image.certain_from = 0.0
            images.append(image)
        else:
            assert system.http.delete(f"/v1/images/{image.id}").status_code == 200
    return images
