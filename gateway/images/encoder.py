"""Sends image files to the vision service that is theirs, and tells what came of it."""

from __future__ import annotations

import time
from dataclasses import dataclass

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
        self._bounds: dict[str, tuple[float, vision_pb2.VisionDescription]] = {}  # by address, with when it was asked

    async def encode(
        self, served: Variant, data: bytes, digest: bytes, embedding_key: bytes, max_pixels: int | None
    ) -> Resolved:
        """Have the file's embedding in the store. Raises what the vision service says of the image, UNAVAILABLE
        without one."""

        async def call(client: VisionClient) -> Encoded:
            bound = None if max_pixels is None else await self._within(client, max_pixels)
            request = vision_pb2.EncodeRequest(image=data, tenant_key=embedding_key, max_pixels=bound)
            return await client.encode(request, timeout=self._timeout)

        attempts = Attempts([served], lambda variant: variant.vision, digest, reconnect_wait=self._reconnect_wait)
        try:
            encoded = await attempts.run(call)
        except LookonceError as error:
            if error.kind is ErrorKind.DEADLINE_EXCEEDED:
                raise LookonceError(error.kind, self._too_slow) from error
            raise
        ENCODES.labels(encoded.outcome).inc()
        VARIANT_ENCODES.labels(served.name, encoded.outcome).inc()
        encode_ms = encoded.timings.encode_ms if encoded.outcome != "hit" else 0.0
        return Resolved(encoded.reference, encoded.outcome, encode_ms, served.name, encoded.notice)

    async def _within(self, client: VisionClient, max_pixels: int) -> int | None:
        """The bound as the service takes it: one not below its own is none, one that leaves no token is that of one."""
        now = time.monotonic()
        asked, description = self._bounds.get(client.address, (0.0, None))
        if description is None or now - asked >= DESCRIPTION_FRESH:
            description = await client.describe()
            self._bounds[client.address] = (now, description)
        if max_pixels >= description.max_pixels:
            return None
        return max(max_pixels, description.least_pixels)
