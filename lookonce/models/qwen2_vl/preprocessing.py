"""From the canonical image to patches, bit for bit what transformers' Qwen2VLImageProcessorPil makes.

The processor's normalisation is a function of one byte and its channel, so it is a table of 3 x 256 values. Patches
travel as bytes (an 8th of the floats, since both temporal frames of a still image are equal) and are looked up where
they are encoded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lookonce.core.errors import CheckpointError
from lookonce.models.family import Patches
from lookonce.models.qwen2_vl.config import smart_resize

CHANNELS = 3


class Preprocessor:
    """Resizes and cuts images as `settings` (preprocessor_config.json with defaults filled in) says."""

    def __init__(self, settings: dict[str, Any]) -> None:
        if not settings["do_resize"]:
            raise CheckpointError("preprocessor_config.json: do_resize false is not supported; set it to true")
        self.patch = int(settings["patch_size"])
        self.merge = int(settings["merge_size"])
        self.temporal_patch = int(settings["temporal_patch_size"])
        self.factor = self.patch * self.merge
        self.resample = Image.Resampling(int(settings["resample"]))
        self.table = _table(settings)  # [3, 256] float32: value of a byte in a channel

    def __call__(self, image: Image.Image, min_pixels: int, max_pixels: int) -> Patches:
        """Patches [t*h*w, 3, patch*patch] of a canonical image, resized to between the two bounds; the merge x merge
        patches of a cell stay together. Releases the GIL where it works long."""
        width, height = image.size
        rows, columns = smart_resize(height, width, factor=self.factor, min_pixels=min_pixels, max_pixels=max_pixels)
        resized = np.asarray(image.resize((columns, rows), resample=self.resample))
        p, m = self.patch, self.merge
        h, w = rows // p, columns // p
        cells = resized.reshape(h // m, m, p, w // m, m, p, CHANNELS).transpose(0, 3, 1, 4, 6, 2, 5)
        pixels = np.ascontiguousarray(cells).reshape(h * w, CHANNELS, p * p)
        return Patches(pixels, (1, h, w), width, height)

    def pixel_values(self, patches: Patches) -> NDArray[np.float32]:
        """The floats the tower is defined over: [patches, 3 * temporal_patch * patch * patch]."""
        values = np.stack([self.table[channel][patches.pixels[:, channel]] for channel in range(CHANNELS)], axis=1)
        frames = np.repeat(values[:, :, None], self.temporal_patch, axis=2)
        return frames.reshape(patches.count, -1)


def _table(settings: dict[str, Any]) -> NDArray[np.float32]:
    """Rescale in float64, round to float32, normalise in float32: the library's order of operations."""
    levels = np.arange(256, dtype=np.uint8)
    values = levels.astype(np.float32)
    if settings["do_rescale"]:
        values = (levels.astype(np.float64) * settings["rescale_factor"]).astype(np.float32)
    table = np.tile(values, (CHANNELS, 1))
    if settings["do_normalize"]:
        mean, std = (_per_channel(settings[name]) for name in ("image_mean", "image_std"))
        table = (table - mean) / std
    return np.ascontiguousarray(table, dtype=np.float32)


def _per_channel(value: float | list[float]) -> NDArray[np.float32]:
    return np.broadcast_to(np.asarray(value, dtype=np.float32), (CHANNELS,))[:, None]
