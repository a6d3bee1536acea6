"""From an encoded file to the canonical image: what a person sees, as 8-bit RGB.

EXIF orientation is applied, transparency lies on white; palettes, grey, 16-bit, CMYK and float images become RGB.
Every refusal has a fixed text that names the reason and the limit. Knows nothing of models.
"""

from __future__ import annotations

import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.units import format_size

T = TypeVar("T")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MIN_SIDE = 8
MAX_RATIO = 200
"""Longer side over shorter side; the model's own processor refuses beyond it."""
# Pillow's own bound is one for the whole process, and only warns at first. Ours is checked from every header instead.
Image.MAX_IMAGE_PIXELS = None
_STRIP_PIXELS = 1 << 19  # worked on at once, in up to 32 bytes a pixel
BYTES_A_PIXEL = 12
"""What decoding takes at most: Pillow's image, the canonical one, and what its decoders hold beside them."""
_COSTLY = {"WEBP": 24}
"""Formats whose decoders take more: WebP's holds two canvases and the pixels once more, for lossless files the values
of each pixel besides."""
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
    max_pixels: int = 100_000_000  # of the image in it


class Decoder:
    """Decodes within limits; may be called from several threads at once.

    Images at hand, from their header to the end of `use`, never hold more than BYTES_A_PIXEL * `max_pixels` bytes
    together, whatever the number of threads. Of a format that takes more a pixel, images may have fewer.
    """

    def __init__(self, limits: ImageLimits) -> None:
        self.limits = limits
        self._room = threading.Condition()
        self._held = 0  # bytes

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
        """The canonical image (mode RGB). Raises IMAGE_INVALID, IMAGE_TOO_LARGE or PAYLOAD_TOO_LARGE."""
        return self.decoded(data, lambda image: image)

    def decoded(self, data: bytes, use: Callable[[Image.Image], T]) -> T:
        """What `use` makes of the canonical image, which counts as held until then. Raises what `decode` raises."""
        self.check_bytes(data)
        with _damage_named():
            image = Image.open(BytesIO(data), formats=FORMATS)  # reads the header
        with image:
            self._check_size(image)
            cost = _COSTLY.get(image.format or "", BYTES_A_PIXEL)
            with self._space(cost * image.width * image.height):
                with _damage_named():
                    image.load()
                    whole = canonical(image)
                return use(whole)

    def _check_size(self, image: Image.Image) -> None:
        width, height = image.size
        short, long = sorted(image.size)
        if short < MIN_SIDE:
            raise _invalid(f"image: {width}x{height} pixels, each side must have at least {MIN_SIDE}")
        if long > MAX_RATIO * short:
            raise _invalid(f"image: {width}x{height} pixels, one side may be at most {MAX_RATIO} times the other")
        most, which = self.limits.max_pixels, ""
        if image.format in _COSTLY:
            most, which = BYTES_A_PIXEL * most // _COSTLY[image.format], f" for {image.format} files"
        if width * height > most:
            raise LookonceError(
                ErrorKind.IMAGE_TOO_LARGE,
                f"image: {width}x{height} is {width * height} pixels, the limit{which} is {most}",
                param="image",
            )

    @contextmanager
    def _space(self, size: int) -> Iterator[None]:
        """Wait for so many bytes."""
        most = BYTES_A_PIXEL * self.limits.max_pixels
        with self._room:
            self._room.wait_for(lambda: self._held == 0 or self._held + size <= most)
            self._held += size
        try:
            yield
        finally:
            with self._room:
                self._held -= size
                self._room.notify_all()


@contextmanager
def _damage_named() -> Iterator[None]:
    """What Pillow raises, in our words."""
    try:
        yield
    except UnidentifiedImageError:
        raise _invalid(_UNKNOWN) from None
    except MemoryError:
        raise LookonceError(
            ErrorKind.OVERLOADED, "image: no memory to decode it now", param="image", retry_after=5.0
        ) from None
    except _DAMAGE:
        raise _invalid(_DAMAGED) from None


def canonical(image: Image.Image) -> Image.Image:
    """The canonical form of a loaded image, in mode RGB."""
    turn = _TRANSPOSE.get(_orientation(image))
    if turn is None:
        return _to_rgb(image)
    plain = image.mode == "RGB" and image.info.get("transparency") is None  # which is not worth a copy
    return (image if plain else _to_rgb(image)).transpose(turn)


def _orientation(image: Image.Image) -> int:
    """1 to 8; TIFF images come out of Pillow already turned. Unreadable EXIF data counts as none."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except _DAMAGE:
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _from_deep_grey(image)
    if "A" in image.getbands() or "a" in image.getbands() or image.info.get("transparency") is not None:
        return _on_white(image)
    return image.convert("RGB")


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The image a few rows at a time, with the number of the first: whole copies in wider modes would take several
    times its memory."""
    width, height = image.size
    rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):
        yield top, image.crop((0, top, width, min(top + rows, height)))


def _on_white(image: Image.Image) -> Image.Image:
    """Composite on white."""
    canvas = Image.new("RGB", image.size)
    for top, part in _strips(image):
        strip = part.convert("RGBA")
        white = Image.new("RGBA", strip.size, (255, 255, 255, 255))
        canvas.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return canvas


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """Grey with more than 8 bits a pixel, scaled rather than clipped.

    16-bit values are scaled by 255/65535. Float values within 0..1 are scaled by 255; other float and 32-bit images
    say nothing about their range and are stretched from their least to their greatest value. A transparent grey becomes
    white.
    """
    if image.mode.startswith("I;16"):
        low, high, deep = 0.0, 0.0, True
    else:
        low, high = _range(image)
        deep = image.mode == "I" and low >= 0 and high <= 0xFFFF
        if image.mode == "F" and low >= 0 and high <= 1:
            low, high = 0.0, 1.0
    transparent = image.info.get("transparency")
    canvas = Image.new("RGB", image.size)
    for top, part in _strips(image):
        values = np.asarray(part)
        if deep:
            grey = ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
            if isinstance(transparent, int):
                grey[values == transparent] = 255
        else:
            grey = np.rint((_real(values) - low) * (255.0 / ((high - low) or 1.0))).astype(np.uint8)
        canvas.paste(Image.fromarray(grey).convert("RGB"), (0, top))
    return canvas


def _range(image: Image.Image) -> tuple[float, float]:
    """The least and the greatest value."""
    ends = [(float(real.min()), float(real.max())) for real in (_real(np.asarray(part)) for _, part in _strips(image))]
    return min(low for low, _ in ends), max(high for _, high in ends)


def _real(values: NDArray[Any]) -> NDArray[np.float64]:
    return np.nan_to_num(values.astype(np.float64), nan=0.0)


def _invalid(message: str) -> LookonceError:
    return LookonceError(ErrorKind.IMAGE_INVALID, message, param="image")
