"""/ and /playground/...: the playground's files. All are read at start: no path of a request reaches the file system,
and nothing here knows of tenants or images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from lookonce.core.errors import invalid
from lookonce.core.sample_images import BUNDLED, Sample, bundled_samples

PAGES = Path(__file__).parent.parent / "playground"
BUNDLED_SAMPLES = BUNDLED.parent
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
}
IMAGES = frozenset({".png", ".jpg", ".jpeg", ".webp"})


@dataclass(frozen=True)
class Asset:
    """A file as it is sent."""

    content: bytes
    media_type: str
    etag: str

    @classmethod
    def of(cls, content: bytes, suffix: str) -> Asset:
        """A file of that kind; the entity tag is made from its bytes."""
        return cls(content, MEDIA_TYPES[suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')


def make_router(samples: Path | None = None) -> APIRouter:
    """The routes. `samples` is a directory of images, with questions in samples.json or without; unset, the bundled
    ones. Raises INVALID_ARGUMENT if it can't be read."""
    assets = {f"/playground/{name}": asset for name, asset in (*_pages(), *_samples(samples))}
    assets["/"] = assets.pop("/playground/index.html")
    router = APIRouter(include_in_schema=False)

    @router.api_route("/", methods=["GET", "HEAD"])
    @router.api_route("/playground/{name:path}", methods=["GET", "HEAD"])
    async def page(request: Request) -> Response:
        """A file of the playground."""
        asset = assets.get(request.url.path)
        if asset is None:
            raise HTTPException(404)
        headers = {**HEADERS, "etag": asset.etag}
        if request.headers.get("if-none-match") == asset.etag:
            return Response(status_code=304, headers=headers)
        return Response(asset.content, media_type=asset.media_type, headers=headers)

    return router


def _pages() -> Iterator[tuple[str, Asset]]:
    for path in sorted(PAGES.iterdir()):
        if path.suffix in MEDIA_TYPES:
            yield path.name, Asset.of(path.read_bytes(), path.suffix)


def _samples(directory: Path | None) -> Iterator[tuple[str, Asset]]:
    """The images, and a list of them for the page."""
    listed = []
    for number, sample in enumerate(_listed(directory)):
        suffix = sample.path.suffix.lower()
        name = f"samples/{number}{suffix}"
        questions = [question for question, _ in sample.questions]
        listed.append({"name": sample.path.stem, "url": f"playground/{name}", "questions": questions})
        try:
            yield name, Asset.of(sample.path.read_bytes(), suffix)
        except (OSError, KeyError) as error:
            raise invalid(f"the sample {sample.path} cannot be read", param="samples") from error
    yield "samples/index.json", Asset.of(json.dumps({"samples": listed}).encode(), ".json")


def _listed(directory: Path | None) -> list[Sample]:
    if directory is None:
        return bundled_samples(BUNDLED_SAMPLES / "samples.json") if BUNDLED_SAMPLES.is_dir() else []
    if not directory.is_dir():
        raise invalid(f"the samples directory {directory} does not exist", param="samples")
    if (directory / "samples.json").is_file():
        return bundled_samples(directory / "samples.json")
    return [Sample(path, ()) for path in sorted(directory.iterdir()) if path.suffix.lower() in IMAGES]
