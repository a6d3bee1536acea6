"""Draws training batches in a worker process, so that drawing costs the trainer nothing.

A batch holds images of one grid. The stream of a (seed, worker) is fixed; on resume pass the step reached so that no
scene comes twice.
"""

import io
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from . import pack, pixels, scenes
from .tokenizer import Words, load

GRIDS = {  # (rows, columns) and how often: what smart_resize makes of images of common proportions
    (7, 7): 34, (6, 8): 14, (6, 7): 12, (8, 6): 9, (7, 6): 9, (6, 6): 5, (5, 8): 6, (5, 9): 5, (8, 5): 4, (9, 5): 3,
    (4, 10): 1, (10, 4): 1, (4, 9): 1, (9, 4): 1, (5, 7): 1, (7, 5): 1, (7, 8): 1, (8, 7): 1, (3, 13): 0.5, (13, 3):
    0.5,
}  # fmt: skip


def pick_grid(rng: np.random.Generator) -> tuple[int, int]:
    weights = np.array(list(GRIDS.values()), dtype=float)
    return list(GRIDS)[rng.choice(len(GRIDS), p=weights / weights.sum())]


def vision_batch(seed: int, size: int, crowd: tuple[int, int]) -> dict:
    """Images with many shapes: patches uint8 [size, patches, 588], labels, marks and numbers per image."""
    rng = np.random.default_rng([seed, 1])
    grid = pick_grid(rng)
    batch = {"grid": grid, "patches": [], "labels": [], "marks": [], "numbers": []}
    for i in range(size):
        scene = scenes.draw(seed * 1000 + i, int(rng.integers(crowd[0], crowd[1] + 1)), grid=grid)
        marks, numbers = pixels.cells(scene.shapes, scene.image.size, grid)
        batch["patches"].append(pixels.patches(scene.image, grid)[0])
        batch["labels"].append(pixels.patch_labels(scene, grid))
        batch["marks"].append(marks)
        batch["numbers"].append(numbers)
    batch["patches"] = np.stack(batch["patches"])
    batch["labels"] = np.stack(batch["labels"])
    return batch


def _work(queue, make, first: int, args: tuple) -> None:
    seed = first
    while True:
        queue.put(make(seed, *args))
        seed += 1


def stream(make, first: int, *args, ahead: int = 6) -> Iterator[dict]:
    """Batches make(first, *args), make(first + 1, *args), ... drawn by one worker process, without end."""
    context = get_context("fork")
    queue = context.Queue(maxsize=ahead)
    worker = context.Process(target=_work, args=(queue, make, first, args), daemon=True)
    worker.start()
    try:
        while True:
            yield queue.get()
    finally:
        worker.terminate()


_WORDS: dict[str, Words] = {}


def words(path: str) -> Words:
    if path not in _WORDS:
        _WORDS[path] = load(Path(path))
    return _WORDS[path]


def _packed(rows: list[pack.Row], marks: list[np.ndarray], known: Words) -> dict:
    batch = pack.collate(rows)
    return batch | {"guides": pack.collate_guides(rows, marks, batch["ids"].shape[1], known.ids["<|image_pad|>"])}


def layout_batch(seed: int, tokenizer: str, size: int, most: int, weights: dict, length: int, variety: float) -> dict:
    """Scenes without images, with packed questions."""
    rng = np.random.default_rng([seed, 2])
    known, grid = words(tokenizer), pick_grid(rng)
    height, width = grid[0] * scenes.CELL, grid[1] * scenes.CELL
    rows, marks, numbers = [], [], []
    for _ in range(size):
        shapes = scenes.layout(rng, int(rng.integers(1, most + 1)), width, height, grid)
        mark, number = pixels.cells(shapes, (width, height), grid)
        marks.append(mark)
        numbers.append(number)
        rows.append(pack.pack_row(known, shapes, (width, height), grid, rng, weights, length, variety))
    return {"grid": grid, "marks": marks, "numbers": numbers} | _packed(rows, marks, known)


def image_batch(
    seed: int,
    tokenizer: str,
    size: int,
    most: int,
    weights: dict,
    length: int,
    variety: float,
    alike: float = 0.0,
    worn: float = 0.0,
    see: Callable[[dict], None] | None = None,
) -> dict:
    """Scenes with images and packed questions; crowded scenes a little more often than sparse ones.

    alike: share of scenes in which shapes of the same colour and kind abound. worn: share of images that come as JPEG
    files of low quality, whatever has befallen them before. see: what to do with the images before
    their guides are laid out; it may move the batch's marks.
    """
    rng = np.random.default_rng([seed, 3])
    known, grid = words(tokenizer), pick_grid(rng)
    batch: dict = {"grid": grid, "patches": [], "marks": [], "numbers": []}
    rows = []
    for i in range(size):
        count = min(most, 1 + int(rng.random() ** 0.8 * most))
        pairs = scenes.alike(count, rng) if rng.random() < alike else None
        scene = scenes.draw(seed * 1000 + i, count, grid=grid, pairs=pairs)
        mark, number = pixels.cells(scene.shapes, scene.image.size, grid)
        image = Image.open(io.BytesIO(scene.jpeg(int(rng.integers(35, 80))))) if rng.random() < worn else scene.image
        batch["patches"].append(pixels.patches(image, grid)[0])
        batch["marks"].append(mark)
        batch["numbers"].append(number)
        rows.append(pack.pack_row(known, scene.shapes, scene.image.size, grid, rng, weights, length, variety))
    batch["patches"] = np.stack(batch["patches"])
    if see:
        see(batch)
    return batch | _packed(rows, batch["marks"], known)
