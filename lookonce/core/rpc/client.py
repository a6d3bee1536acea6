"""Clients of the two model services: channels, deadlines, and every failure as a LookonceError."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.identity import EmbeddingReference
from lookonce.core.rpc.messages import DEFAULT_MAX_MESSAGE_BYTES, from_rpc_error, join
from lookonce.core.rpc.tls import Tls, read_authorities, read_pair
from lookonce.core.telemetry.tracing import Step, failure_of, start
from protos.lookonce.v1 import common_pb2, language_pb2, language_pb2_grpc, vision_pb2, vision_pb2_grpc

MAX_RECORD_BYTES = 2 << 30  # 16,384 tokens of a 32B with a deepstack in float32 are 1.3 GB
_OUTCOMES = {vision_pb2.HIT: "hit", vision_pb2.MISS: "miss", vision_pb2.COALESCED: "coalesced"}


def open_channel(address: str, tls: Tls | None = None, *, server_name: str | None = None) -> grpc.aio.Channel:
    """A channel to "host:port" or "unix:/path"; connects when first used, reconnects by itself. `server_name` is what
    the certificate must be for when that is not the host."""
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", DEFAULT_MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", DEFAULT_MAX_MESSAGE_BYTES),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 500),
        ("grpc.keepalive_time_ms", 20000),
        ("grpc.keepalive_timeout_ms", 10000),
        ("grpc.enable_http_proxy", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if tls is None or not tls.enabled:
        return grpc.aio.insecure_channel(address, options=options)
    if server_name is not None:
        options.append(("grpc.ssl_target_name_override", server_name))
    roots = read_authorities(tls.ca) if tls.ca else None
    key, certificate = read_pair(tls.certificate, tls.key) if tls.certificate or tls.key else (None, None)
    credentials = grpc.ssl_channel_credentials(roots, key, certificate)
    return grpc.aio.secure_channel(address, credentials, options=options)


@dataclass(frozen=True)
class Encoded:
    """The answer to Encode. `outcome` is "hit", "miss" or "coalesced"; `record` stands there when it was asked for."""

    reference: EmbeddingReference
    outcome: str
    stored: bool
    timings: vision_pb2.EncodeTimings
    record: bytes | None = None
    notice: str = ""  # why the image was made smaller, and the setting that changes that


def encoded_from_proto(result: vision_pb2.EncodeResult, record: bytes | None = None) -> Encoded:
    outcome = _OUTCOMES.get(result.outcome, "miss")
    return Encoded(
        EmbeddingReference.from_proto(result.reference), outcome, result.stored, result.timings, record, result.notice
    )


class _Client:
    label = "service"
    stub_class: Any  # of the service: both have Forget

    def __init__(self, address: str, *, tls: Tls | None = None, server_name: str | None = None) -> None:
        self.address = address
        self.channel = open_channel(address, tls, server_name=server_name)
        self.stub = self.stub_class(self.channel)
        self._health = health_pb2_grpc.HealthStub(self.channel)

    async def healthy(self, timeout: float = 2.0) -> bool:
        """Whether the service says SERVING."""
        try:
            reply = await self._health.Check(health_pb2.HealthCheckRequest(), timeout=timeout)
        except grpc.aio.AioRpcError:
            return False
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    async def forget(
        self, keys: Sequence[bytes] = (), image_digests: Sequence[bytes] = (), *, timeout: float = 10.0
    ) -> common_pb2.ForgetResponse:
        """Erase embeddings, and what was made from them, from this process and its stores."""
        request = common_pb2.ForgetRequest(keys=keys, image_digests=image_digests)
        reply: common_pb2.ForgetResponse = await self._unary("Forget", request, timeout)
        return reply

    async def close(self) -> None:
        await self.channel.close()

    def _step(self, method: str) -> Step:
        """A step of the current trace for one call to this service."""
        step = start(f"{self.label}: {method}", "client")
        step.note(address=self.address)
        return step

    async def _unary(self, method: str, request: Any, timeout: float, step: Step | None = None) -> Any:
        step = step or self._step(method)
        with self._calling(step):
            return await getattr(self.stub, method)(request, timeout=timeout, metadata=step.outgoing)

    async def _stream(self, method: str, request: Any, timeout: float) -> AsyncIterator[Any]:
        step = self._step(method)
        call = getattr(self.stub, method)(request, timeout=timeout, metadata=step.outgoing)
        try:
            with self._calling(step):
                async for message in call:
                    yield message
        finally:
            call.cancel()  # no effect once the call has ended; stops the far end when the reader went away

    @contextmanager
    def _calling(self, step: Step) -> Iterator[None]:
        """Ends the step with the block; the call's failure as a LookonceError."""
        try:
            yield
        except grpc.aio.AioRpcError as error:
            failure = from_rpc_error(error, self.label)
            step.end(failure_of(failure))
            raise failure from error
        finally:
            step.end()


class VisionClient(_Client):
    """The vision service at one address."""

    label = "vision service"
    stub_class = vision_pb2_grpc.VisionEncoderStub

    async def encode(self, request: vision_pb2.EncodeRequest, *, timeout: float = 60.0) -> Encoded:
        """Encode one image; the record is joined from its chunks when tensors were asked for."""
        messages = self._stream("Encode", request, timeout)
        try:
            first = await anext(messages, None)
            if first is None or first.WhichOneof("payload") != "result":
                raise LookonceError(ErrorKind.INTERNAL, "the vision service sent no result")
            result = first.result
            record: bytes | None = result.record or None
            if result.record_bytes_to_follow:
                record = await join((message.chunk async for message in messages), max_bytes=MAX_RECORD_BYTES)
            return encoded_from_proto(result, record)
        finally:
            await messages.aclose()  # type: ignore[attr-defined]

    def encode_stream(
        self, requests: AsyncIterator[vision_pb2.EncodeStreamRequest], *, timeout: float
    ) -> AsyncIterator[vision_pb2.EncodeStreamResponse]:
        """Many images over one stream, answered as each finishes."""
        return self._stream("EncodeStream", requests, timeout)

    async def fetch(self, key: bytes, *, timeout: float = 30.0) -> bytes:
        """A serialized record. Raises EMBEDDING_MISSING when the service has it no more."""
        chunks = self._stream("Fetch", vision_pb2.FetchRequest(key=key), timeout)
        return await join(chunks, max_bytes=MAX_RECORD_BYTES)

    async def describe(self, *, timeout: float = 5.0) -> vision_pb2.VisionDescription:
        """What model it serves, within what limits."""
        request, untraced = common_pb2.DescribeRequest(), Step(None)
        reply: vision_pb2.VisionDescription = await self._unary("Describe", request, timeout, untraced)
        return reply


class LanguageClient(_Client):
    """The language service at one address."""

    label = "language service"
    stub_class = language_pb2_grpc.LanguageModelStub

    def generate(
        self, request: language_pb2.GenerateRequest, *, timeout: float = 600.0
    ) -> AsyncIterator[language_pb2.GenerateEvent]:
        """Stream an answer; closing the iterator cancels the work."""
        return self._stream("Generate", request, timeout)

    async def score(self, request: language_pb2.ScoreRequest, *, timeout: float = 600.0) -> language_pb2.ScoreResponse:
        """Probabilities of choices."""
        reply: language_pb2.ScoreResponse = await self._unary("Score", request, timeout)
        return reply

    async def embed(self, request: language_pb2.EmbedRequest, *, timeout: float = 600.0) -> language_pb2.EmbedResponse:
        """Vectors of texts and images."""
        reply: language_pb2.EmbedResponse = await self._unary("Embed", request, timeout)
        return reply

    async def describe(self, *, timeout: float = 5.0) -> language_pb2.LanguageDescription:
        """What model it serves, within what limits."""
        request, untraced = common_pb2.DescribeRequest(), Step(None)
        reply: language_pb2.LanguageDescription = await self._unary("Describe", request, timeout, untraced)
        return reply
