"""Fills the store: an image goes to a lookonce vision service once, and comes back as a message part for vLLM."""

from __future__ import annotations

from typing import Any

from lookonce.core.rpc.client import VisionClient
from lookonce.core.rpc.tls import Tls
from protos.lookonce.v1 import vision_pb2


class Filler:
    """One vision service, by its gRPC address. Used from one event loop."""

    def __init__(self, address: str, *, tls: Tls | None = None) -> None:
        self._client = VisionClient(address, tls=tls)

    async def part(
        self, image: bytes, *, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> dict[str, Any]:
        """The part of a chat message that stands for an encoded image file (JPEG, PNG ...).

        The embedding is in the store when this returns. Raises lookonce.core.errors.LookonceError.
        """
        request = vision_pb2.EncodeRequest(image=image)
        if min_pixels is not None:
            request.min_pixels = min_pixels
        if max_pixels is not None:
            request.max_pixels = max_pixels
        encoded = await self._client.encode(request)
        reference = encoded.reference
        return {
            "type": "image_embeds",
            "image_embeds": {"image_grid_thw": list(reference.grid_thw)},
            "uuid": reference.key.hex(),
        }

    async def close(self) -> None:
        """Close the connection."""
        await self._client.close()
