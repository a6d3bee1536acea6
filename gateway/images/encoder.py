"""Sends image files to the vision service that is theirs, and tells what came of it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from gateway.images.pixel_bounds import AS_SERVED, PixelBounds
from gateway.metrics import ENCODES, VARIANT_ENCODES
from gateway.routing.retries import Attempts
from gateway.routing.variants import DEFAULT, Variant
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.identity import EmbeddingReference
from lookonce.core.rpc.client import Encoded, VisionClient
from protos.lookonce.v1 import vision_pb2

DESCRIPTION_FRESH = 30.0  # seconds that a service's own pixel bounds are believed


@dataclass(frozen=True)
class Resolved:
    """An embedding to answer from, and what it took: "hit" (known), "miss" (encoded now), "coalesced" (with others)."""

    reference: EmbeddingReference
    outcome: str
    encode_ms: float
    variant: str = DEFAULT  # of the model: whose language service it is for
    notice: str = ""  # what the vision service has to say about it


class Encoder:
    """Encode over a variant's vision replicas; the same file goes to the same one."""

    def __init__(self, *, timeout: float, reconnect_wait: float) -> None:
        self._timeout = timeout  # seconds
        self._too_slow = (
            f"the image was not encoded within {timeout:g} s. What was begun is ended and kept: ask again later. "
            "--encode-timeout of the gateway (LOOKONCE_GATEWAY_ENCODE_TIMEOUT) allows for more time, "
            "--max-pixels of the vision service makes large images smaller"
        )
        self._reconnect_wait = reconnect_wait  # seconds
        self._descriptions: dict[str, tuple[float, vision_pb2.VisionDescription]] = {}  # by address; since when

    async def encode(
        self, served: Variant, data: bytes, digest: bytes, embedding_key: bytes, bounds: PixelBounds
    ) -> Resolved:
        """Have the file's embedding in the store. Raises what the vision service says of the image, UNAVAILABLE
        without one, INVALID_ARGUMENT for bounds that were asked for and are out of its range."""

        async def call(client: VisionClient) -> Encoded:
            fit = bounds if bounds == AS_SERVED else bounds.within(await self._described(client))
            request = vision_pb2.EncodeRequest(
                image=data, tenant_key=embedding_key, min_pixels=fit.min, max_pixels=fit.max
            )
            return await client.encode(request, timeout=self._timeout)

        attempts = Attempts([served], lambda variant: variant.vision, digest, reconnect_wait=self._reconnect_wait)
        try:
            encoded = await attempts.run(call)
        except LookonceError as error:
            if error.kind is ErrorKind.DEADLINE_EXCEEDED:
                raise LookonceError(error.kind, self._too_slow) from error
            param = bounds.field_of(error.param)
            if param is not None:
                raise LookonceError(error.kind, error.message, param=param) from error
            raise
        ENCODES.labels(encoded.outcome).inc()
        VARIANT_ENCODES.labels(served.name, encoded.outcome).inc()
        encode_ms = encoded.timings.encode_ms if encoded.outcome != "hit" else 0.0
        return Resolved(encoded.reference, encoded.outcome, encode_ms, served.name, encoded.notice)

    async def check_bounds(self, served: Variant, bounds: PixelBounds) -> None:
        """Raise INVALID_ARGUMENT for bounds that a service of that variant would refuse; nothing without one."""
        for endpoint in sorted(served.vision.endpoints, key=lambda item: item.down_until):
            try:
                description = await self._described(endpoint.client)
            except LookonceError:
                continue  # encoding will tell
            bounds.within(description)
            return

    async def _described(self, client: VisionClient) -> vision_pb2.VisionDescription:
        """The service's description, with the bounds it takes."""
        now = time.monotonic()
        asked, description = self._descriptions.get(client.address, (0.0, None))
        if description is None or now - asked >= DESCRIPTION_FRESH:
            description = await client.describe()
            self._descriptions[client.address] = (now, description)
        return description
