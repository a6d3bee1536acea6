"""What a caller may give as an image, and the request that uploads it."""

from __future__ import annotations

import io
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lookonce.core.errors import invalid

if TYPE_CHECKING:
    from PIL import Image

    ImageSource = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image

_ID = re.compile(r"(?:lookonce:)?(img_[a-z2-7]{52})")
_PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16"})


def image_id(source: ImageSource) -> str | None:
    """The id, if that is what it is."""
    found = _ID.fullmatch(source) if isinstance(source, str) else None
    return found[1] if found else None


def upload_body(source: ImageSource) -> dict[str, Any]:
    """The body of the upload: the file, or where it is. Reads the file, so it may block.

    Raises INVALID_ARGUMENT when a file can't be read or the type is none of those above.
    """
    if isinstance(source, str) and source[:5].lower() == "data:":
        return {"json": {"data": source}}
    if isinstance(source, str) and re.match(r"https?://", source, re.IGNORECASE):
        return {"json": {"url": source}}
    return {"files": {"file": ("image", _file(source), "application/octet-stream")}}


def _file(source: ImageSource) -> bytes:
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if isinstance(source, str | os.PathLike):
        return _read(Path(source))
    pillow = sys.modules.get("PIL.Image")  # who has an image of Pillow's has imported it
    if pillow is not None and isinstance(source, pillow.Image):
        return _encode(source)
    kinds = "a path, bytes, a PIL image, a URL or an image id"
    raise invalid(f"an image must be {kinds}, not {type(source).__name__}", param="image")


def _read(path: Path) -> bytes:
    try:
        return path.expanduser().read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a path"
        raise invalid(f"{str(path)[:200]}: cannot be read ({reason})", param="image") from error


def _encode(source: Image.Image) -> bytes:
    """As PNG, which loses nothing; modes that PNG lacks as RGB."""
    buffer = io.BytesIO()
    try:
        (source if source.mode in _PNG_MODES else source.convert("RGB")).save(buffer, "PNG")
    except (OSError, ValueError) as error:
        raise invalid(f"the PIL image cannot be written (mode {source.mode})", param="image") from error
    return buffer.getvalue()
