"""The images of one request are encoded side by side, each once, and the first that is wrong is named."""

from __future__ import annotations

import asyncio
import base64
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from gateway.auth import Tenant
from gateway.http.request_images import ENCODED_AT_ONCE, keep_all
from gateway.images.pixel_bounds import PixelBounds
from gateway.schemas.requests import ImageUrlPart
from gateway.settings import GatewaySettings
from lookonce.core.errors import ErrorKind, LookonceError

TENANT = Tenant("red", b"d" * 32, b"e" * 32)


@dataclass
class Library:
    """Adds an image once as many are being added as there are seats."""

    seats: int
    at_once: int = 0
    most: int = 0

    def __post_init__(self) -> None:
        self.full = asyncio.Event()

    async def add(self, data: bytes, tenant: Tenant, *, bounds: PixelBounds) -> tuple[Any, Any]:
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        if self.at_once >= self.seats:
            self.full.set()
        await self.full.wait()
        self.at_once -= 1
        if data.startswith(b"bad"):
            raise LookonceError(ErrorKind.IMAGE_INVALID, "not an image")
        return data, None


def parts(*files: bytes) -> dict[str, ImageUrlPart]:
    urls = [f"data:image/png;base64,{base64.b64encode(file).decode()}" for file in files]
    parts = [ImageUrlPart(type="image_url", image_url=url) for url in urls]
    return {f"messages.0.content.{place}": part for place, part in enumerate(parts)}


async def kept(library: Library, images: dict[str, ImageUrlPart]) -> dict[str, Any]:
    gateway: Any = SimpleNamespace(settings=GatewaySettings(), images=library)
    return await keep_all(images, {}, gateway, TENANT)


async def test_images_are_added_together_and_not_all_at_once() -> None:
    library = Library(seats=ENCODED_AT_ONCE)
    images = parts(*(b"%d" % number for number in range(3 * ENCODED_AT_ONCE)))
    found = await kept(library, images)
    assert list(found) == list(images) and library.most == ENCODED_AT_ONCE
    assert [part.record for part in found.values()] == [b"%d" % number for number in range(3 * ENCODED_AT_ONCE)]


async def test_one_image_twice_is_added_one_after_the_other() -> None:
    library = Library(seats=1)
    assert len(await kept(library, parts(b"same", b"same", b"same"))) == 3
    assert library.most == 1


async def test_the_first_wrong_image_is_named() -> None:
    with pytest.raises(LookonceError) as caught:
        await kept(Library(seats=3), parts(b"good", b"bad one", b"bad two"))
    assert (caught.value.kind, caught.value.param) == (ErrorKind.IMAGE_INVALID, "messages.0.content.1")
