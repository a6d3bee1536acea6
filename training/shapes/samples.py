"""Writes the sample images that demo, tests and playground show, with their ground truth and questions.

Scenes come from a fixed list of seeds. A sample is kept when the checkpoint answers all of its questions rightly, so
that the demo shows a working system; how often it errs on scenes that nobody picked is what evaluate.py measures.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from . import questions, scenes
from .evaluate import AnswerMany

FIRST_SEED = 8_000_000_000
WANTED = (  # file, shapes, (width, height)
    ("one-star.png", 1, (224, 224)),
    ("two-shapes.png", 2, (320, 240)),
    ("pair.jpg", 2, (400, 300)),
    ("three-shapes.png", 3, (256, 256)),
    ("three-wide.jpg", 3, (640, 360)),
    ("four-shapes.png", 4, (384, 384)),
    ("four-tall.png", 4, (240, 320)),
    ("five-shapes.png", 5, (448, 448)),
    ("five-photo.jpg", 5, (1024, 768)),
    ("six-shapes.png", 6, (512, 512)),
    ("six-wide.jpg", 6, (640, 480)),
    ("icon.png", 2, (56, 56)),
)
PER_IMAGE = 8


def asked_about(scene: scenes.Scene, seed: int, types: Sequence[str]) -> list[questions.Question]:
    """Eight different questions about a scene, types taking turns."""
    rng = np.random.default_rng([seed, 17])
    found: list[questions.Question] = []
    for turn in range(4):
        for question in questions.ask_all(scene, rng, types):
            fresh = all((question.type, question.about) != (other.type, other.about) for other in found)
            if fresh and (turn == 0 or question.type not in ("describe", "count_all")):
                found.append(question)
    keep = [q for q in found if q.type in ("describe", "count_all")]
    return (keep + [q for q in found if q not in keep])[:PER_IMAGE]


def build(answer_many: AnswerMany, out: Path, types: Sequence[str]) -> list[dict]:
    """Write images and samples.json; returns the latter's content."""
    out.mkdir(parents=True, exist_ok=True)
    samples, seed = [], FIRST_SEED
    for name, count, size in WANTED:
        while True:
            seed += 1
            scene = scenes.draw(seed, count, size=size, wear=False)
            asked = asked_about(scene, seed, types)
            data = scene.png() if name.endswith("png") else scene.jpeg(88)
            if (
                len(scene.shapes) != count
                or len(asked) < PER_IMAGE
                or ("star" in name and scene.shapes[0].kind != "star")
            ):
                continue
            answers = answer_many(data, [question.text for question in asked])
            if all(question.accepts(answer.text) for question, answer in zip(asked, answers, strict=True)):
                break
        (out / name).write_bytes(data)
        samples.append(
            {
                "file": name,
                "width": size[0],
                "height": size[1],
                "seed": seed,
                "shapes": [shape.truth() for shape in scene.shapes],
                "questions": [{"type": q.type, "question": q.text, "answer": q.answer} for q in asked],
            }
        )
    (out / "samples.json").write_text(json.dumps(samples, indent=1) + "\n", encoding="utf-8")
    return samples


def main() -> None:
    from .answerers import Lean

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--types", nargs="+", default=list(questions.TYPES), choices=questions.TYPES)
    args = parser.parse_args()
    for sample in build(Lean(args.checkpoint), args.out, args.types):
        print(sample["file"], sample["seed"], [shape["colour"] + " " + shape["kind"] for shape in sample["shapes"]])


if __name__ == "__main__":
    main()
