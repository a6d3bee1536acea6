"""Small images for the page, read again from the source; one that has changed or gone since is left out."""

from __future__ import annotations

import asyncio
import base64
import io
import warnings
from collections.abc import Iterator

from PIL import Image, ImageOps

from lookonce.core.errors import LookonceError
from lookonce.core.http_fetch.fetch_policy import FetchPolicy
from lookonce.core.identity import image_digest, image_id
from lookonce.moderation.batch.run_identity import Manifest
from lookonce.moderation.batch.sources.items import Item, items
from lookonce.moderation.batch.sources.opening import SourceOptions, open_source
from lookonce.moderation.batch.sources.reader import Reader

SIDE = 200  # pixels, the longer one
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 100_000_000
_AT_ONCE = 8


def thumbnails(manifest: Manifest, wanted: dict[int, str]) -> dict[int, str]:
    """data: URLs by index; `wanted` holds the image id that each must have. Blocking."""
    try:
        options = SourceOptions(**manifest.options)
        source = open_source(manifest.identity.source, options)
        chosen = list(_chosen(items(source), set(wanted)))
    except LookonceError:
        return {}
    return asyncio.run(_all(chosen, wanted, options.max_bytes))


def _chosen(listed: Iterator[Item], wanted: set[int]) -> Iterator[Item]:
    last = max(wanted, default=-1)
    for item in listed:
        if item.index > last:
            return
        if item.index in wanted:
            yield item


async def _all(chosen: list[Item], wanted: dict[int, str], max_bytes: int) -> dict[int, str]:
    reader = Reader(threads=_AT_ONCE, max_bytes=max_bytes, policy=FetchPolicy())
    found: dict[int, str] = {}
    waiting = iter(chosen)
    decoding = asyncio.Lock()  # one at a time: a single large image takes more than a gigabyte

    async def worker() -> None:
        for item in waiting:
            try:
                data, _ = await reader.read(item)
            except LookonceError:
                continue
            if image_id(image_digest(data)) == wanted[item.index]:
                async with decoding:
                    url = await asyncio.to_thread(data_url, data)
                if url is not None:
                    found[item.index] = url

    try:
        await asyncio.gather(*(worker() for _ in range(_AT_ONCE)))
    finally:
        reader.close()
    return found


def data_url(data: bytes) -> str | None:
    """The image made small, or None when it can't be drawn. Blocking."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                if opened.width * opened.height > MAX_PIXELS:
                    return None
                opened.draft("RGB", (2 * SIDE, 2 * SIDE))
                upright = ImageOps.exif_transpose(opened)
                upright.thumbnail((SIDE, SIDE))
                rgba = upright.convert("RGBA")
        flat = Image.new("RGB", rgba.size, "white")
        flat.paste(rgba, mask=rgba.getchannel("A"))
        buffer = io.BytesIO()
        flat.save(buffer, "JPEG", quality=78, optimize=True)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
