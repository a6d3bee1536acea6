"""From an encoded file to the canonical picture: what a person sees, as 8-bit RGB.

EXIF orientation is applied, transparency lies on white; palettes, grey, 16-bit, CMYK and float pictures become RGB.
Every refusal has a fixed text that names the reason and the limit. Knows nothing of models.
"""

from __future__ import annotations

import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from lookonce.errors import ErrorKind, LookonceError
from lookonce.units import format_size

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MIN_SIDE = 8
MAX_RATIO = 200
"""Longer side over shorter side; the model's own processor refuses beyond it."""
# Pillow's own bound is one for the whole process, and only warns at first. Ours is checked from every header instead.
Image.MAX_IMAGE_PIXELS = None
_STRIP_PIXELS = 1 << 21
_ORIENTATION_TAG = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RuntimeError,
    struct.error,
    zlib.error,
)
"""What Pillow raises on files that are not what they say."""
_UNKNOWN = "image: not a JPEG, PNG, WEBP, GIF, BMP or TIFF file"
_DAMAGED = "image: the file is damaged or truncated"


@dataclass(frozen=True)
class ImageLimits:
    """What is refused before any pixel is decoded."""

    max_bytes: int = 20 << 20  # of the encoded file
    max_pixels: int = 100_000_000  # of the picture it holds
    min_side: int = MIN_SIDE
    max_ratio: float = MAX_RATIO


class Decoder:
    """Decodes within limits; may be called from several threads at once.

    Pictures being decoded never hold more than `max_pixels` together, so memory is bounded by about 12 bytes a pixel of
    one largest picture, whatever the number of threads.
    """

    def __init__(self, limits: ImageLimits) -> None:
        self.limits = limits
        self._room = threading.Condition()
        self._pixels = 0

    def check_bytes(self, data: bytes) -> None:
        """Raise for an empty file or one over the byte limit."""
        if not data:
            raise _invalid("image: the file is empty")
        if len(data) > self.limits.max_bytes:
            raise LookonceError(
                ErrorKind.PAYLOAD_TOO_LARGE,
                f"image: the file has {len(data)} bytes, the limit is {format_size(self.limits.max_bytes)}",
                param="image",
            )

    def decode(self, data: bytes) -> Image.Image:
        """The canonical picture (mode RGB). Raises IMAGE_INVALID, IMAGE_TOO_LARGE or PAYLOAD_TOO_LARGE."""
        self.check_bytes(data)
        try:
            with self._open(data) as image:
                self._check_size(*image.size)
                with self._space(image.size[0] * image.size[1]):
                    image.load()
                    return canonical(image)
        except LookonceError:
            raise
        except MemoryError:
            raise LookonceError(
                ErrorKind.OVERLOADED, "image: no memory to decode it now", param="image", retry_after=5.0
            ) from None
        except _DAMAGE:
            raise _invalid(_DAMAGED) from None

    def _open(self, data: bytes) -> Image.Image:
        try:
            return Image.open(BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:
            raise _invalid(_UNKNOWN) from None

    def _check_size(self, width: int, height: int) -> None:
        limits = self.limits
        short, long = sorted((width, height))
        if short < limits.min_side:
            raise _invalid(f"image: {width}x{height} pixels, each side must have at least {limits.min_side}")
        if long > limits.max_ratio * short:
            raise _invalid(
                f"image: {width}x{height} pixels, one side may be at most {limits.max_ratio:g} times the other"
            )
        if width * height > limits.max_pixels:
            raise LookonceError(
                ErrorKind.IMAGE_TOO_LARGE,
                f"image: {width}x{height} is {width * height} pixels, the limit is {limits.max_pixels}",
                param="image",
            )

    @contextmanager
    def _space(self, pixels: int) -> Iterator[None]:
        with self._room:
            self._room.wait_for(lambda: self._pixels == 0 or self._pixels + pixels <= self.limits.max_pixels)
            self._pixels += pixels
        try:
            yield
        finally:
            with self._room:
                self._pixels -= pixels
                self._room.notify_all()


def canonical(image: Image.Image) -> Image.Image:
    """The canonical picture of a loaded image, in mode RGB."""
    orientation = _orientation(image)
    picture = _to_rgb(image)
    return picture.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else picture


def _orientation(image: Image.Image) -> int:
    """1 to 8; TIFF pictures come out of Pillow already turned. Unreadable EXIF data counts as none."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except _DAMAGE:
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return Image.fromarray(_to_8_bit(image)).convert("RGB")
    if "A" in image.getbands() or "a" in image.getbands() or image.info.get("transparency") is not None:
        return _on_white(image)
    return image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """Composite on white, a strip at a time: whole RGBA copies of a large picture would triple its memory."""
    width, height = image.size
    picture = Image.new("RGB", image.size)
    rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height))).convert("RGBA")
        white = Image.new("RGBA", strip.size, (255, 255, 255, 255))
        picture.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return picture


def _to_8_bit(image: Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Grey with more than 8 bits a pixel, scaled rather than clipped.

    16-bit values are scaled by 255/65535. Float values within 0..1 are scaled by 255; other float and 32-bit pictures
    say nothing about their range and are stretched from their least to their greatest value. A transparent grey becomes
    white.
    """
    values = np.asarray(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and values.min() >= 0 and values.max() <= 0xFFFF):
        grey = ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
        transparent = image.info.get("transparency")
        if isinstance(transparent, int):
            grey[values == transparent] = 255
        return grey
    real = np.nan_to_num(values.astype(np.float64), nan=0.0)
    low, high = float(real.min()), float(real.max())
    if image.mode == "F" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    return np.rint((real - low) * (255.0 / ((high - low) or 1.0))).astype(np.uint8)


def _invalid(message: str) -> LookonceError:
    return LookonceError(ErrorKind.IMAGE_INVALID, message, param="image")
