"""What benchmarks.engine measures: our engine and encoder, transformers' modules, or both; and in which thread."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from PIL import Image

from benchmarks.bare import COLUMNS, ROWS, Bare, Images
from lm_service.engine.answer import TokenTable
from lm_service.engine.packed.engine import PackedEngine
from lm_service.engine.packed.options import PackedOptions
from lookonce.models.checkpoint import Checkpoint
from lookonce.models.omp_thread import run_in_omp_thread
from lookonce.models.text_adapter import ModelAdapter
from tests.modules import load_language_model, load_vision_tower

T = TypeVar("T")
Seconds = dict[str, list[float]]
"""What was measured, by name: of each round."""
CPU = torch.device("cpu")


async def beside(engine: PackedEngine | None, function: Callable[[], T]) -> T:
    """Call a function in the engine's thread: one that computed in another would slow both
    (see lookonce.models.omp_thread). Without an engine, in a thread of its own."""
    if engine is None:
        return run_in_omp_thread(function)
    done: Future[T] = Future()
    engine._tell(lambda: done.set_result(function()))
    return await asyncio.wrap_future(done)


def own_encoding(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Callable[[], float]:
    """A function that encodes an image as the vision service does, from its patches, and returns the seconds."""
    family = checkpoint.family
    encoder = family.load_encoder(checkpoint, dtype, device)
    side = math.isqrt(family.least_pixels(checkpoint.config))  # of a token
    pixels = side * COLUMNS * side * ROWS
    patches = encoder.prepare(Image.new("RGB", (side * COLUMNS, side * ROWS)), pixels, pixels)

    def encoding() -> float:
        began = time.perf_counter()
        encoder.encode([patches])
        return time.perf_counter() - began

    encoding()
    return encoding


@dataclass(frozen=True)
class Sides:
    """What is measured: our engine and encoder, transformers' modules, or both in turn."""

    adapter: ModelAdapter | None
    encoding: Callable[[], float] | None
    bare: Bare | None
    options: PackedOptions
    rounds: int

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        side: str,
        options: PackedOptions,
        rounds: int,
        *,
        towers: bool,
        text: bool,
        device: torch.device = CPU,
        dtype: torch.dtype = torch.float32,
    ) -> Sides:
        """Of "engine", "bare" or "both", the vision halves, the language halves."""
        adapter = encoding = bare = None
        dimensions = checkpoint.family.dimensions(checkpoint.config)
        if side != "bare" and text:
            devices = [device] * dimensions.layers
            load = checkpoint.family.load_text
            adapter = run_in_omp_thread(load, checkpoint, dtype, lambda name: device, devices)
        if side != "bare" and towers:
            encoding = run_in_omp_thread(own_encoding, checkpoint, device, dtype)
        if side != "engine":
            rows = Images(dimensions.hidden, dimensions.deepstack).rows
            half: list[Any] = [None, None]
            if text:
                half = [part.to(device) for part in run_in_omp_thread(load_language_model, checkpoint, dtype)]
            tower = run_in_omp_thread(load_vision_tower, checkpoint, dtype).to(device) if towers else None
            bare = Bare(*half, rows.to(device, dtype), tower)
        return cls(adapter, encoding, bare, options, rounds)

    @property
    def table(self) -> TokenTable:
        """Of tokens that are all alike."""
        return TokenTable([(number, b"a") for number in range(self.adapter.shape.vocabulary if self.adapter else 0)])

    def images(self) -> Images:
        """A loader of our adapter's rows."""
        if self.adapter is None:
            return Images(1)
        shape = self.adapter.shape
        images = Images(shape.hidden, shape.deepstack)
        images.rows = images.rows.to(shape.device, shape.dtype)
        return images
