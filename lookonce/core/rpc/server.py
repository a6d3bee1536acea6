"""A gRPC server as every service runs it: errors mapped, deadlines demanded, health, TLS, drain on SIGTERM."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from lookonce.core.errors import ErrorKind, LookonceError, invalid
from lookonce.core.rpc.messages import DEFAULT_MAX_MESSAGE_BYTES, abort
from lookonce.core.rpc.tls import Tls, read_authorities, read_pair
from lookonce.core.telemetry.tracing import HEADER, Step, begin, failure_of

log = structlog.get_logger(__name__)
_NO_DEADLINE = ("/grpc.health.v1.", "/grpc.reflection.")


@dataclass(frozen=True)
class ServerOptions:
    """`listen` is "host:port" (port 0: any free one) or "unix:/path"."""

    listen: str
    tls: Tls = field(default_factory=Tls)
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES
    reflection: bool = False
    grace: float = 20.0  # seconds that calls under way get after SIGTERM
    linger: float = 0.5  # seconds of it in which new calls are still taken, health being NOT_SERVING already


class _Guard(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpcio ships no types
    """Maps errors at the edge: ours to their code and trailer, all others to one fixed text (and a log line)."""

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(details)
        if handler is None or details.method.startswith(_NO_DEADLINE):
            return handler
        takes, gives = (
            "stream" if each else "unary" for each in (handler.request_streaming, handler.response_streaming)
        )
        guard = _guard_stream if handler.response_streaming else _guard_unary
        return getattr(grpc, f"{takes}_{gives}_rpc_method_handler")(
            guard(getattr(handler, f"{takes}_{gives}"), details.method),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


def _guard_unary(inner: Callable[[Any, Any], Awaitable[Any]], method: str) -> Callable[[Any, Any], Awaitable[Any]]:
    async def call(request: Any, context: Any) -> Any:
        async with _guarded(context, method):
            return await inner(request, context)

    return call


def _guard_stream(inner: Callable[[Any, Any], AsyncIterator[Any]], method: str) -> Callable[[Any, Any], Any]:
    async def call(request: Any, context: Any) -> AsyncIterator[Any]:
        async with _guarded(context, method):
            async for message in inner(request, context):
                yield message

    return call


@asynccontextmanager
async def _guarded(context: Any, method: str) -> AsyncIterator[None]:
    step = _step(context, method)
    try:
        _enter(context, method)
        yield
    except LookonceError as error:
        step.end(failure_of(error))
        await abort(context, error)
    except grpc.aio.AbortError:
        raise
    except Exception:  # the edge: nothing foreign may leak
        log.exception("call failed", method=method)
        step.end("internal")
        await abort(context, LookonceError(ErrorKind.INTERNAL, "internal error"))
    finally:
        step.end()


def _step(context: Any, method: str) -> Step:
    """Join the caller's trace, if it has one."""
    header = next((value for name, value in context.invocation_metadata() or () if name == HEADER), None)
    return begin(header, method.removeprefix("/")) if isinstance(header, str) else Step(None)


def _enter(context: Any, method: str) -> None:
    """A call without a deadline could hold what it took for ever."""
    log.debug("call", method=method)
    if context.time_remaining() is None:
        raise invalid("every call needs a deadline", param="deadline")


class Server:
    """Owns a grpc.aio server: add servicers to `.grpc`, then `run` until a signal."""

    def __init__(self, options: ServerOptions) -> None:
        limit = options.max_message_bytes
        self.options = options
        self.grpc = grpc.aio.server(
            interceptors=[_Guard()],
            options=[
                ("grpc.max_receive_message_length", limit),
                ("grpc.max_send_message_length", limit),
                ("grpc.so_reuseport", 0),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 5000),
            ],
        )
        self.health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.grpc)
        self.address = options.listen
        self._names: list[str] = [""]
        self._stop = asyncio.Event()
        self._on_drain: list[Callable[[], None]] = []

    def on_drain(self, call: Callable[[], None]) -> None:
        """Have something called when no new call is taken any more: long streams must end by themselves."""
        self._on_drain.append(call)

    def add(self, service_name: str, register: Callable[[Any], None]) -> None:
        """Register a servicer under its full name ("lookonce.v1.VisionEncoder"), for health and reflection too."""
        register(self.grpc)
        self._names.append(service_name)

    async def start(self) -> str:
        """Listen; the address clients use (with the real port). Not serving yet: call `set_serving` when ready."""
        if self.options.reflection:
            names = (*self._names[1:], health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self.grpc)
        await self.set_serving(False)
        self.address = self._bind()
        await self.grpc.start()
        return self.address

    async def set_serving(self, serving: bool) -> None:
        """Tell health checkers."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in self._names:
            await self.health.set(name, status)

    def stop(self) -> None:
        """Ask `wait` to return, as SIGTERM does."""
        self._stop.set()

    async def wait(self) -> None:
        """Return on SIGTERM, SIGINT or `stop`; then drain: NOT_SERVING, calls under way get `grace` seconds.

        During the first `linger` of them new calls are taken as ever, so that whoever watches health can go elsewhere
        first. Then clients are told to connect anew (GOAWAY); calls that this catches before they have begun end
        CANCELLED, which clients take for UNAVAILABLE and ask again."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        try:
            await self._stop.wait()
            log.info("draining", grace=self.options.grace)
            await self.health.enter_graceful_shutdown()
            linger = min(self.options.linger, self.options.grace)
            await asyncio.sleep(linger)
            for call in self._on_drain:
                call()
            await self.grpc.stop(self.options.grace - linger)
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
            _remove_socket(self.options.listen)

    def _bind(self) -> str:
        listen, tls = self.options.listen, self.options.tls
        if listen.startswith("unix:"):
            _clear_socket(Path(listen.removeprefix("unix:")))
        else:
            _check_port(listen)
        try:
            credentials = _server_credentials(tls) if tls.enabled else None
            old_umask = os.umask(0o077)  # a unix socket is for its owner alone
            try:
                if credentials is None:
                    port = self.grpc.add_insecure_port(listen)
                else:
                    port = self.grpc.add_secure_port(listen, credentials)
            finally:
                os.umask(old_umask)
        except (RuntimeError, OSError) as error:
            raise LookonceError(ErrorKind.CONFLICT, f"cannot listen on {listen}: is the address in use?") from error
        return listen if listen.startswith("unix:") else f"{listen.rpartition(':')[0]}:{port}"


def _clear_socket(path: Path) -> None:
    """A folder for the socket, and no socket that an earlier process left."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
    except OSError as error:
        raise invalid(f"listen: unix:{path} cannot be made there ({error.strerror})", param="listen") from error


def _remove_socket(listen: str) -> None:
    if listen.startswith("unix:"):
        Path(listen.removeprefix("unix:")).unlink(missing_ok=True)


def _check_port(listen: str) -> None:
    """gRPC would take 99999 for 34463."""
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise invalid(f"listen must be host:port (port 0 to 65535) or unix:/path, got {listen!r}", param="listen")


def _server_credentials(tls: Tls) -> grpc.ServerCredentials:
    pair = read_pair(tls.certificate, tls.key)
    roots = read_authorities(tls.ca) if tls.ca else None
    return grpc.ssl_server_credentials([pair], root_certificates=roots, require_client_auth=roots is not None)
