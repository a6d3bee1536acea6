"""The gRPC face of the vision service: translation only."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from lookonce.core.errors import LookonceError
from lookonce.core.rpc.messages import CHUNK_BYTES, INLINE_BYTES, chunks, to_proto
from lookonce.core.telemetry import tracing
from protos.lookonce.v1 import common_pb2, vision_pb2, vision_pb2_grpc
from vision_service import metrics
from vision_service.core import Encoding, VisionCore
from vision_service.stream import EncodeWindow

_OUTCOMES = {"hit": vision_pb2.HIT, "miss": vision_pb2.MISS, "coalesced": vision_pb2.COALESCED}


@dataclass(frozen=True)
class Answer:
    """A result and the record that follows it in chunks, if it is too large to ride along."""

    result: vision_pb2.EncodeResult
    record: bytes = b""


class VisionServicer(vision_pb2_grpc.VisionEncoderServicer):
    """See vision.proto."""

    def __init__(
        self,
        core: VisionCore,
        description: vision_pb2.VisionDescription,
        shrunk: Callable[[int, int], bool] | None,
    ) -> None:
        """`shrunk`: whether an image of a width and height is resized below the checkpoint's own bound, unasked."""
        self._shrunk = shrunk
        self._core = core
        self._description = description  # without the counters
        self._windows: set[EncodeWindow[Answer]] = set()

    def drain(self) -> None:
        """End open streams once what they have read is answered."""
        for window in self._windows:
            window.end()

    async def Encode(self, request: vision_pb2.EncodeRequest, context: Any) -> AsyncIterator[vision_pb2.EncodeResponse]:
        """One image."""
        answer = await self._answer(request)
        yield vision_pb2.EncodeResponse(result=answer.result)
        for piece in chunks(answer.record):
            yield vision_pb2.EncodeResponse(chunk=piece)

    async def EncodeStream(
        self, requests: AsyncIterator[vision_pb2.EncodeStreamRequest], context: Any
    ) -> AsyncIterator[vision_pb2.EncodeStreamResponse]:
        """Many images."""
        window = self._description.stream_window
        await context.send_initial_metadata((("lookonce-window", str(window)),))
        async with EncodeWindow(requests, self._answer, window) as answers:
            self._windows.add(answers)
            try:
                async for id_, outcome in answers:
                    if isinstance(outcome, LookonceError):
                        yield vision_pb2.EncodeStreamResponse(id=id_, error=to_proto(outcome))
                        continue
                    yield vision_pb2.EncodeStreamResponse(id=id_, result=outcome.result)
                    for piece in chunks(outcome.record):
                        yield vision_pb2.EncodeStreamResponse(id=id_, chunk=piece)
            finally:
                self._windows.discard(answers)

    async def Fetch(self, request: vision_pb2.FetchRequest, context: Any) -> AsyncIterator[common_pb2.RecordChunk]:
        """The record of a key."""
        with metrics.counting_errors():
            record = await self._core.fetch(request.key)
        for piece in chunks(record):
            yield piece

    async def Forget(self, request: common_pb2.ForgetRequest, context: Any) -> common_pb2.ForgetResponse:
        """Erasure."""
        with metrics.counting_errors():
            forgotten, complete = await self._core.forget(request.keys, request.image_digests)
        return common_pb2.ForgetResponse(forgotten=forgotten, complete=complete)

    async def Describe(self, request: common_pb2.DescribeRequest, context: Any) -> vision_pb2.VisionDescription:
        """Model, limits and counters."""
        description = vision_pb2.VisionDescription()
        description.CopyFrom(self._description)
        counters = self._core.counters
        description.encodes, description.hits, description.coalesced = (
            counters.encodes,
            counters.hits,
            counters.coalesced,
        )
        return description

    async def _answer(self, request: vision_pb2.EncodeRequest) -> Answer:
        with metrics.counting_errors():
            encoding = await self._core.encode(
                request.image,
                tenant_key=request.tenant_key,
                min_pixels=request.min_pixels if request.HasField("min_pixels") else None,
                max_pixels=request.max_pixels if request.HasField("max_pixels") else None,
                ttl=request.ttl if request.HasField("ttl") else None,
            )
        result = _result(encoding)
        if (
            self._shrunk is not None
            and not request.HasField("max_pixels")
            and self._shrunk(encoding.reference.width, encoding.reference.height)
        ):
            result.notice = (
                f"the image was resized to at most {self._description.max_pixels} pixels, because a CPU encodes it: "
                "--max-pixels of the vision service (LOOKONCE_VISION_MAX_PIXELS) changes that"
            )
        times = result.timings
        tracing.annotate(outcome=encoding.outcome, queue_ms=times.queue_ms, preprocess_ms=times.preprocess_ms)
        tracing.annotate(encode_ms=times.encode_ms, tokens=encoding.reference.tokens)
        if not request.with_tensors:
            return Answer(result)
        if encoding.record.nbytes <= CHUNK_BYTES:
            record = encoding.record.serialize()
        else:
            record = await asyncio.to_thread(encoding.record.serialize)
        if len(record) <= INLINE_BYTES:
            result.record = record
            return Answer(result)
        result.record_bytes_to_follow = len(record)
        return Answer(result, record)


def _result(encoding: Encoding) -> vision_pb2.EncodeResult:
    work = encoding.work
    made = encoding.outcome != "hit"
    return vision_pb2.EncodeResult(
        reference=encoding.reference.to_proto(),
        outcome=_OUTCOMES[encoding.outcome],
        timings=vision_pb2.EncodeTimings(
            queue_ms=work.queue_ms if made else 0,
            preprocess_ms=work.preprocess_ms if made else 0,
            encode_ms=work.encode_ms if made else 0,
            store_ms=work.store_ms,
            total_ms=encoding.total_ms,
        ),
        stored=work.stored,
    )
