"""Eight typed questions in one call against one, on images that nobody has seen and on warm ones, through the gateway.

    lookonce up --model DIRECTORY --port 8123 &
    python -m benchmarks.typed_questions --url http://127.0.0.1:8123 [--side 896] [--rounds 9]

Calls take turns, so that both sides see the same machine; the ratio is of medians.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from typing import Any

import httpx2
import numpy as np
from PIL import Image

QUESTIONS: list[dict[str, Any]] = [
    {"text": "Is the door open?", "type": "yes_no"},
    {"text": "Is there a person?", "type": "yes_no"},
    {"text": "Which colour is it?", "choices": ["red", "green", "blue", "white"]},
    {"text": "What is it made of?", "choices": ["wood", "metal", "glass"]},
    {"text": "How clean is it?", "scale": ["dirty", "fair", "clean"]},
    {"text": "How sharp is the picture?", "scale": {"min": 1, "max": 5}},
    {"text": "Is it day?", "type": "yes_no"},
    {"text": "Which season is it?", "choices": ["spring", "summer", "autumn", "winter"]},
]


def noise(side: int, seed: int) -> bytes:
    """An image that nobody has seen."""
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def asked(http: httpx2.Client, image: str, questions: list[dict[str, Any]]) -> float:
    """Milliseconds of a call."""
    began = time.perf_counter()
    http.post(f"/v1/images/{image}/questions", json={"questions": questions}).raise_for_status()
    return (time.perf_counter() - began) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--side", type=int, default=896, help="pixels of the image's sides (896: 1,024 tokens)")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    found: dict[str, list[float]] = {}
    with httpx2.Client(base_url=given.url, timeout=600, trust_env=False) as http:
        for number in range(2 * given.rounds):
            name, questions = ("one", QUESTIONS[:1]) if number % 2 else ("eight", QUESTIONS)
            seed = time.time_ns() % 2**32 + number
            image = http.post("/v1/images", files={"file": noise(given.side, seed)}).json()["id"]
            found.setdefault(f"{name}, cold", []).append(asked(http, image, questions))
            warm = [{**question, "text": f"{question['text']} Now?"} for question in questions]
            found.setdefault(f"{name}, warm", []).append(asked(http, image, warm))
    for state in ("cold", "warm"):
        one, eight = (statistics.median(found[f"{name}, {state}"][1:]) for name in ("one", "eight"))
        print(f"{state}: one {one:.1f} ms, eight {eight:.1f} ms, {eight / one:.2f}")


if __name__ == "__main__":
    main()
