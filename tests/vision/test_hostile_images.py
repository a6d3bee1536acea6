"""Hostile files against the decoder: mutated images and decompression bombs. Refusals have fixed texts, memory stays
bounded, nothing foreign escapes."""

from __future__ import annotations

import random
import re
import resource
import struct
import zlib
from collections.abc import Iterator

import pytest

from lookonce.core.errors import ErrorKind, LookonceError
from tests.images import odd_files, photograph, save
from vision_service.images import Decoder, ImageLimits

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on files it reads in spite of damage
LIMITS = ImageLimits(max_bytes=4 << 20, max_pixels=2_000_000)
MUTATIONS = 10_000
MEMORY = 400 << 20  # bytes the process may grow by
KINDS = {ErrorKind.IMAGE_INVALID, ErrorKind.IMAGE_TOO_LARGE, ErrorKind.PAYLOAD_TOO_LARGE}
TEXTS = re.compile(
    r"image: (not a JPEG, PNG, WEBP, GIF, BMP or TIFF file|the file is damaged or truncated|the file is empty"
    r"|the file has \d+ bytes, the limit is [\d.]+ \w+|\d+x\d+ is \d+ pixels, the limit( for WEBP files)? is \d+"
    r"|\d+x\d+ pixels, each side must have at least \d+|\d+x\d+ pixels, .*)"
)


def seeds() -> list[bytes]:
    small = photograph("coffee", (48, 40))
    kinds = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
    return [*(save(small, kind) for kind in kinds), *(data for data in odd_files().values() if len(data) < 60_000)]


def mutated(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        # Headers decide the most, so they are hit as often as all the rest.
        at = rng.randrange(min(64, len(changed))) if rng.random() < 0.5 else rng.randrange(len(changed))
        what = rng.randrange(5)
        if what == 0:
            changed[at] = rng.randrange(256)
        elif what == 1:
            changed[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\0\1"))
        elif what == 2:
            del changed[at : at + rng.randrange(1, 32)]
        elif what == 3:
            changed[at:at] = rng.randbytes(rng.randrange(1, 32))
        else:
            changed[at:at] = changed[max(0, at - 64) : at]
        if not changed:
            break
    return bytes(changed[: rng.randrange(len(changed) + 1)] if rng.random() < 0.1 else changed)


def bombs() -> Iterator[tuple[str, bytes]]:
    """Small files that claim, or hold, very many pixels."""
    sides = (3_000, 20_000, 65_535, 1_000_000, 2**31 - 1)
    for width in sides:
        for height in (3_000, 65_535, 2**31 - 1):
            yield f"png {width}x{height}", _png(width, height, b"")
            yield f"bmp {width}x{height}", _bmp(width, height)
        for short in (width & 0xFFFF, 65_535):
            yield (
                f"gif {width} {short}",
                b"GIF89a" + struct.pack("<HH", min(width, 65_535), short or 1) + b"\x80\0\0" * 9,
            )
        yield f"tiff {width}", _tiff(width, width)
    body = zlib.compress(bytes(2_000 * 6_001), 9)
    yield "png that holds them", _png(6_000, 2_000, body, depth=8)
    yield "png of text", _png(40, 40, zlib.compress(bytes(41 * 40)), text=zlib.compress(bytes(64 << 20), 9))
    for kind in ("PNG", "GIF", "TIFF", "WEBP", "BMP", "JPEG"):
        options = {"compression": "tiff_deflate"} if kind == "TIFF" else {}
        yield f"{kind} of one colour", save(photograph("coffee", (8, 8)).resize((2_000, 1_100)), kind, **options)


def _png(width: int, height: int, data: bytes, depth: int = 8, text: bytes = b"") -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    extra = chunk(b"zTXt", b"bomb\0\0" + text) if text else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _bmp(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


def _tiff(width: int, height: int) -> bytes:
    tags = ((256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (278, height), (279, 1))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + bytes(4)


def attempt(decoder: Decoder, data: bytes) -> bool:
    """Whether the file was an image; a refusal must be ours."""
    try:
        image = decoder.decode(data)
    except LookonceError as error:
        refusal = error
    else:
        assert image.mode == "RGB" and image.width * image.height <= LIMITS.max_pixels
        return True
    assert refusal.kind in KINDS, refusal
    assert TEXTS.fullmatch(refusal.message), refusal.message
    return False


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def sweep(cases: int) -> int:
    decoder, rng, files = Decoder(LIMITS), random.Random(17), seeds()
    return sum(attempt(decoder, mutated(rng.choice(files), rng)) for _ in range(cases))


def test_bombs_are_refused_before_their_pixels_take_memory() -> None:
    decoder, before, made = Decoder(LIMITS), peak(), dict(bombs())
    assert len(made) >= 40
    decoded = [name for name, data in made.items() if attempt(decoder, data)]
    assert set(decoded) <= {"png of text"}, decoded
    assert peak() - before < MEMORY


def test_some_mutated_files_are_refused_in_our_words() -> None:
    assert 0 < sweep(600) < 600


@pytest.mark.slow
def test_ten_thousand_mutated_files_are_refused_in_our_words() -> None:
    before = peak()
    assert 0 < sweep(MUTATIONS) < MUTATIONS
    assert peak() - before < MEMORY
