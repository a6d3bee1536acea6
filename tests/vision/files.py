"""Images as encoded files."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO

from PIL import Image


def encoded(image, kind="PNG", **options):
    """The bytes of a file."""
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def small(colour=(10, 200, 30), size=(32, 32)):
    """A plain image as PNG: cheap, and another file for another colour."""
    return encoded(Image.new("RGB", size, colour))


def png_of_declared_size(width, height):
    """A PNG that declares any size and holds a few zeros: a decompression bomb from outside."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
