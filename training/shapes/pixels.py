"""Turns an image into Qwen2-VL patches without torch, and marks which cell holds which shape.

Gives the same numbers as Qwen2VLImageProcessorPil (tests/training proves it), kept as uint8 so that worker processes
can hand them over cheaply; `normalise` finishes the job in the trainer.
"""

import numpy as np
from PIL import Image, ImageDraw

from .scenes import CELL, COLOURS, KINDS, Scene, Shape, _paint, grid_of

PATCH = CELL // 2
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)  # as Qwen2-VL publishes
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)


def patches(image: Image.Image, grid: tuple[int, int] | None = None) -> tuple[np.ndarray, tuple[int, int]]:
    """uint8 [rows*columns*4, 3*14*14] in Qwen2-VL's order (merge cells first), and (rows, columns)."""
    rows, columns = grid or grid_of(*image.size)
    pixels = np.asarray(image.convert("RGB").resize((columns * CELL, rows * CELL), Image.Resampling.BICUBIC))
    cut = pixels.reshape(rows, 2, PATCH, columns, 2, PATCH, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    return np.ascontiguousarray(cut.reshape(rows * columns * 4, 3 * PATCH * PATCH)), (rows, columns)


def cells(shapes: tuple[Shape, ...], size: tuple[int, int], grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Per object: int [n, 3] of (cell, kind, colour), and float [n, 3] of (dx, dy, size) about [-1, 1]."""
    rows, columns = grid
    width, height = size
    marks, numbers = [], []
    for shape in shapes:
        u, v = shape.cx / width * columns, shape.cy / height * rows
        column, row = min(int(u), columns - 1), min(int(v), rows - 1)
        marks.append((row * columns + column, KINDS.index(shape.kind), COLOURS.index(shape.colour)))
        spread = shape.radius / min(width, height)
        numbers.append(((u - column) * 2 - 1, (v - row) * 2 - 1, (spread - 0.16) / 0.08))
    return np.array(marks, dtype=np.int64).reshape(-1, 3), np.array(numbers, dtype=np.float32).reshape(-1, 3)


def patch_labels(scene: Scene, grid: tuple[int, int]) -> np.ndarray:
    """int64 [patches] in Qwen2-VL's order: 0 for ground, 1 + kind * 8 + colour where a shape covers most of the
    patch."""
    rows, columns = grid
    width, height = scene.image.size
    canvas = Image.new("L", (width, height), 0)
    pen = ImageDraw.Draw(canvas)
    for shape in scene.shapes:
        _paint(pen, shape, 1.0, 1 + KINDS.index(shape.kind) * len(COLOURS) + COLOURS.index(shape.colour))
    ys = ((np.arange(rows * 2) + 0.5) * height / (rows * 2)).astype(int)
    xs = ((np.arange(columns * 2) + 0.5) * width / (columns * 2)).astype(int)
    labels = np.asarray(canvas)[np.ix_(ys, xs)]
    return labels.reshape(rows, 2, columns, 2).transpose(0, 2, 1, 3).reshape(-1).astype(np.int64)
