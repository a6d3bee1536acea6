"""Decoding takes no more bytes a pixel than it is counted with, in every format and mode."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.vision.files import encoded

WIDTH, HEIGHT = 2400, 2000
STRIP_BYTES = 20 << 20  # what is worked on at once, whatever the image's size
_SCRIPT = """
import os, sys
from pathlib import Path
from vision_service.images import _COSTLY, BYTES_A_PIXEL, Decoder, ImageLimits

def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

decoder = Decoder(ImageLimits(max_bytes=1 << 30))
for path in map(Path, sys.argv[1:]):
    if os.fork() == 0:
        data = path.read_bytes()
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        decoder.decode(data)
        kind = path.name.split("-")[0]
        print(path.name, resident("VmHWM") - before, _COSTLY.get(kind, BYTES_A_PIXEL), flush=True)
        os._exit(0)
    os.wait()
"""


def files():
    """By "FORMAT-what": every mode that a format has, in every form that its decoder treats in its own way."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    pixels = np.stack([x * 255 // WIDTH, y * 255 // HEIGHT, (x + y) % 256], -1).astype(np.uint8)
    grey = pixels[..., 0]
    colour, turned = Image.fromarray(pixels), Image.Exif()
    turned[0x0112] = 6
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, pixels.shape, dtype=np.uint8))
    palette = colour.quantize(64)
    deep, wide = Image.fromarray(grey.astype(np.uint16) * 257), Image.fromarray(grey.astype(np.int32) * 1000)
    real = Image.fromarray((grey / 255).astype(np.float32))
    return {
        "JPEG-turned": encoded(colour, "JPEG", exif=turned.tobytes()),
        "JPEG-progressive": encoded(colour, "JPEG", progressive=True, subsampling=0),
        "JPEG-cmyk-progressive": encoded(colour.convert("CMYK"), "JPEG", progressive=True),
        "PNG-alpha-turned": encoded(colour.convert("RGBA"), "PNG", exif=turned.tobytes(), compress_level=1),
        "PNG-16-bit": encoded(deep, "PNG", compress_level=1),
        "PNG-transparent-palette": encoded(palette, "PNG", transparency=3, compress_level=1),
        "WEBP-lossy": encoded(colour, "WEBP", method=0),
        "WEBP-lossless-noise": encoded(noise, "WEBP", lossless=True, method=0, quality=0),
        "WEBP-animated": encoded(colour, "WEBP", method=0, save_all=True, append_images=[noise]),
        "GIF-transparent": encoded(palette, "GIF", transparency=3),
        "BMP-colour": encoded(colour, "BMP"),
        "TIFF-float": encoded(real, "TIFF", compression="tiff_lzw"),
        "TIFF-32-bit": encoded(wide, "TIFF"),
        "TIFF-16-bit": encoded(deep, "TIFF"),
        "TIFF-alpha": encoded(colour.convert("RGBA"), "TIFF", compression="tiff_lzw"),
        "TIFF-cmyk": encoded(colour.convert("CMYK"), "TIFF", compression="tiff_adobe_deflate"),
        "TIFF-lab": encoded(colour.convert("LAB"), "TIFF"),
    }


@pytest.mark.slow  # test_images holds the budget
def test_no_format_takes_more_than_it_is_counted_with(tmp_path):
    for name, data in files().items():
        (tmp_path / name).write_bytes(data)
    command = [sys.executable, "-c", _SCRIPT, *map(str, sorted(tmp_path.iterdir()))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, _, _ in lines} == {path.name for path in tmp_path.iterdir()}
    over = [(n, int(p) / (WIDTH * HEIGHT)) for n, p, cost in lines if int(p) > int(cost) * WIDTH * HEIGHT + STRIP_BYTES]
    assert over == []
