"""Images and questions for the demo: the bundled samples with their truth, or two drawn here whose truth is what the
unsplit model answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from lookonce.core.errors import CheckpointError

BUNDLED = Path(__file__).resolve().parent.parent / "data" / "samples" / "samples.json"

QUESTIONS = (
    "What colour is the circle?",
    "How many shapes are there?",
    "Is there a star?",
    "What is the biggest shape?",
    "Where is the square?",
    "What shape is red?",
    "Does this image contain a green cross? Answer yes or no.",
    "Describe the image.",
)


@dataclass(frozen=True)
class Sample:
    """An image file and its questions, each with the true answer where it is known."""

    path: Path
    questions: tuple[tuple[str, str | None], ...]


def bundled_samples(file: Path = BUNDLED) -> list[Sample]:
    """What samples.json lists, bare or under "samples": [{"file": name, "questions": [{"question": text,
    "answer": text}]}]. A question may be a pair of texts."""
    try:
        content = json.loads(file.read_bytes())
        items = content["samples"] if isinstance(content, dict) else content
        return [Sample(file.parent / item["file"], tuple(map(_pair, item["questions"]))) for item in items]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{file} is not a list of samples; install lookonce again") from None


def _pair(asked: dict[str, str] | list[str]) -> tuple[str, str | None]:
    question, answer = (asked["question"], asked.get("answer")) if isinstance(asked, dict) else asked
    return question, answer


def drawn_samples(directory: Path) -> list[Sample]:
    """Two images of shapes, drawn into `directory`."""
    from PIL import Image, ImageDraw

    first = Image.new("RGB", (280, 224), "white")
    draw = ImageDraw.Draw(first)
    draw.ellipse((30, 30, 120, 120), fill="red")
    draw.rectangle((160, 110, 250, 200), fill="blue")
    second = Image.new("RGB", (224, 252), "lightgrey")
    draw = ImageDraw.Draw(second)
    draw.polygon(((112, 20), (190, 150), (34, 150)), fill="green")
    draw.ellipse((70, 170, 140, 240), fill="gold")
    draw.rectangle((160, 180, 210, 230), fill="purple")
    samples = []
    for name, image in (("circle-square.png", first), ("triangle-circle-square.png", second)):
        image.save(directory / name)
        samples.append(Sample(directory / name, tuple((question, None) for question in QUESTIONS)))
    return samples


def same_answer(answer: str, truth: str) -> bool:
    """Equal but for case, outer spaces and a final full stop."""
    return _plain(answer) == _plain(truth)


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").casefold()
