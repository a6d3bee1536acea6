"""Images with ground truth for moderation: drawn shapes, some of them twice, some broken; and twelve rules."""

from __future__ import annotations

import bisect
import random
from dataclasses import dataclass, field
from pathlib import Path

from training.shapes.scenes import draw

FIRST_SEED = 7_000_000  # beyond those of training
KINDS = ("star", "circle", "square", "triangle", "cross")
COLOURS = ("red", "blue", "green", "yellow")
PAIRS = ("red circle", "blue square")
BROKEN = (b"", b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(64))


@dataclass
class Images:
    """`truth` holds each file's (colour, kind) pairs, None for a broken one; `copies` whose bytes a file has."""

    folder: Path
    truth: dict[str, list[tuple[str, str]] | None] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)


def make_images(folder: Path, count: int, *, duplicates: float = 0.1, broken: float = 0.01) -> Images:
    """The same for the same arguments."""
    rng = random.Random(count)
    made = Images(folder)
    good: list[str] = []
    for number in range(count):
        name = f"{number % 4}/{number:05}.png"
        chance = rng.random()
        if chance < duplicates and good:
            original = rng.choice(good)
            data = (folder / original).read_bytes()
            made.truth[name], made.copies[name] = made.truth[original], original
        elif chance < duplicates + broken:
            data, made.truth[name] = BROKEN[number % len(BROKEN)] + bytes([number % 256, number // 256]), None
        else:
            scene = draw(FIRST_SEED + number)
            data, made.truth[name] = scene.png(), [(shape.colour, shape.kind) for shape in scene.shapes]
            good.append(name)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return made


def policy_text(*, threshold: float = 0.5) -> str:
    """Twelve rules; `cross` has a follow-up question."""
    lines = [f"name: twelve\nrules:\n- {{id: star, threshold: {threshold}, severity: high, question: {_ask('star')}}}"]
    lines += [f"- {{id: {kind}, question: {_ask(kind)}}}" for kind in KINDS[1:-1]]
    lines.append(f"- {{id: cross, question: {_ask('cross')}, follow_up: 'How many crosses are there?', "
                 "follow_up_tokens: 12}")  # fmt: skip
    lines += [f"- {{id: {colour}, question: {_ask(f'{colour} shape')}}}" for colour in COLOURS]
    lines += [f"- {{id: {pair.replace(' ', '-')}, question: {_ask(pair)}}}" for pair in PAIRS]
    lines.append("- {id: crowded, question: 'How many shapes are there?', severity: low, choices: "
                 "['1', '2', '3', '4', '5', '6'], positive: ['4', '5', '6']}")  # fmt: skip
    return "\n".join(lines) + "\n"


def _ask(thing: str) -> str:
    return f'"Does this {{input}} contain a {thing}? Answer yes or no."'


def holds(rule: str, shapes: list[tuple[str, str]]) -> bool:
    """The ground truth of a rule."""
    if rule == "crowded":
        return len(shapes) >= 4
    if "-" in rule:
        return tuple(rule.split("-")) in shapes
    return any(rule in shape for shape in shapes)


def area_under_curve(positive: list[float], negative: list[float]) -> float:
    """ROC AUC: how often a positive scores above a negative."""
    ranked = sorted(negative)
    below = sum(bisect.bisect_left(ranked, score) + bisect.bisect_right(ranked, score) for score in positive)
    return below / 2 / len(positive) / len(negative)
