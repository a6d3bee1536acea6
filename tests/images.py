"""Images for tests: real photographs that scikit-image ships, at odd sizes, in every mode people send."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
from skimage import data


def photograph(name: str = "astronaut", size: tuple[int, int] | None = None) -> Image.Image:
    """A real photograph as RGB, resized to `size` (width, height) when given."""
    image = Image.fromarray(getattr(data, name)()).convert("RGB")
    return image.resize(size, Image.Resampling.BICUBIC) if size else image


def odd_files() -> dict[str, bytes]:
    """Encoded files, by a name that says what is odd about them."""
    cat, cup = photograph("chelsea", (225, 150)), photograph("coffee", (200, 140))
    made = {
        f"{w}x{h}": save(photograph("astronaut", (w, h)), "PNG")
        for w, h in ((29, 31), (56, 56), (1000, 57), (57, 1000))
    }
    exif = Image.Exif()
    exif[0x0112] = 6
    made["exif-rotated"] = save(cat, "JPEG", exif=exif, quality=90)
    made["palette"] = save(cup.quantize(64), "PNG")
    transparent = cat.copy()
    transparent.putalpha(Image.linear_gradient("L").resize(cat.size))
    made["rgba"] = save(transparent, "PNG")
    made["greyscale"] = save(cup.convert("L"), "PNG")
    deep = (np.asarray(cup.convert("L")).astype(np.uint16) * 257).astype(np.uint16)
    made["16-bit"] = save(Image.fromarray(deep), "PNG")
    made["cmyk"] = save(cat.convert("CMYK"), "JPEG", quality=90)
    made["webp"] = save(cup, "WEBP", quality=80)
    return made


def save(image: Image.Image, kind: str, **options: object) -> bytes:
    """The image as a file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
