"""Runs the application under uvicorn: one socket, drain on SIGTERM, exit status 0."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import structlog
import uvicorn
from starlette.types import ASGIApp

from gateway.http.protocol import Connection, Connections
from gateway.settings import GatewaySettings
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.rpc.tls import read_pair

BACKLOG = 2048
SPARE_FILES = 256
"""Open files left for everything that is no client's connection."""
log = structlog.get_logger(__name__)


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are `listen`'s own: uvicorn would raise them again after draining, and the exit status with them."""
        yield


async def listen(app: ASGIApp, settings: GatewaySettings, on_drain: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT; requests under way get the grace time. Raises CONFLICT when it can't listen,
    INVALID_ARGUMENT for a certificate that can't be used."""
    if settings.tls_certificate is not None:
        read_pair(settings.tls_certificate, settings.tls_key)
    room = max(1, min(settings.max_connections, _most_files() - SPARE_FILES))
    bound, address = _bind(settings)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        loop="none",
        http=partial(Connection, Connections(settings, room)),  # type: ignore[arg-type]
        timeout_graceful_shutdown=max(1, round(settings.drain_grace)),
        timeout_keep_alive=75,
        ssl_certfile=settings.tls_certificate,
        ssl_keyfile=settings.tls_key,
        backlog=BACKLOG,
    )
    server = _Server(config)
    loop = asyncio.get_running_loop()

    def stop() -> None:
        log.info("draining", grace=settings.drain_grace)
        on_drain()
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    log.info("listening", url=address)
    try:
        await server.serve(sockets=[bound])
    finally:
        if settings.uds is not None:
            settings.uds.unlink(missing_ok=True)


def _most_files() -> int:
    """How many files the process may open, after asking for all that it may ask for."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS has a hard limit that it doesn't grant
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft if soft != resource.RLIM_INFINITY else 1 << 20


def _bind(settings: GatewaySettings) -> tuple[socket.socket, str]:
    try:
        if settings.uds is not None:
            return _bind_unix(settings.uds), f"unix:{settings.uds}"
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((settings.host.strip("[]"), settings.port))
    except OSError as error:
        where = settings.uds or f"{settings.host}:{settings.port}"
        raise LookonceError(ErrorKind.CONFLICT, f"cannot listen on {where}: is the address in use?") from error
    host = f"[{settings.host}]" if family == socket.AF_INET6 else settings.host
    scheme = "https" if settings.tls_certificate else "http"
    return bound, f"{scheme}://{host}:{bound.getsockname()[1]}"


def _bind_unix(path: Path) -> socket.socket:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old_umask = os.umask(0o077)  # the socket is for its owner alone
    try:
        bound.bind(str(path))
    finally:
        os.umask(old_umask)
    return bound
