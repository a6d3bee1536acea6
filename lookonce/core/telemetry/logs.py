"""Logs for every process: structured, to stderr; readable lines in a terminal, JSON elsewhere. And its metrics."""

from __future__ import annotations

import logging
import socket
import sys
import threading
from pathlib import Path
from typing import Literal
from wsgiref.simple_server import WSGIRequestHandler

import structlog
from prometheus_client import make_wsgi_app, start_http_server
from prometheus_client.exposition import ThreadingWSGIServer

from lookonce.core.errors import invalid

LogFormat = Literal["auto", "console", "json"]
UNIX = "unix:"


def configure_logging(
    service: str, level: str = "info", log_format: LogFormat = "auto", *, lasting: bool = False
) -> None:
    """Set up structlog; every line names its service. `lasting`: this process neither configures it again nor replaces
    stderr, so that each logger is made once and not anew for each line."""
    console = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    renderer: structlog.types.Processor = (
        structlog.dev.ConsoleRenderer() if console else structlog.processors.JSONRenderer()
    )
    shared: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        *([] if console else [structlog.processors.format_exc_info]),
    ]
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),  # as it is then: programs may replace it
        cache_logger_on_first_use=lasting,  # a cached logger outlives a later configuration
    )
    structlog.contextvars.bind_contextvars(service=service)
    libraries = logging.StreamHandler(sys.stderr)
    libraries.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    logging.basicConfig(level=logging.WARNING, handlers=[libraries])


def serve_metrics(listen: str) -> None:
    """Answer Prometheus on "host:port" or "unix:/path". INVALID_ARGUMENT when that cannot be listened on."""
    host, _, port = listen.rpartition(":")
    if not listen.startswith(UNIX) and not (port.isdigit() and int(port) <= 65535):
        raise invalid(
            f"metrics_listen must be host:port (port 0 to 65535) or unix:/path, got {listen!r}", param="metrics_listen"
        )
    try:
        if listen.startswith(UNIX):
            _serve_metrics_at(Path(listen.removeprefix(UNIX)))
        else:
            start_http_server(int(port), addr=host or "127.0.0.1")
    except OSError:
        raise invalid(
            f"metrics_listen: cannot listen on {listen}: is the address in use?", param="metrics_listen"
        ) from None


def _serve_metrics_at(path: Path) -> None:
    path.unlink(missing_ok=True)  # of a process that was killed
    server = _UnixServer(str(path), _SilentHandler)  # type: ignore[arg-type]
    server.set_app(make_wsgi_app())
    threading.Thread(target=server.serve_forever, daemon=True).start()


class _UnixServer(ThreadingWSGIServer):
    address_family = socket.AF_UNIX

    def server_bind(self) -> None:
        """Without a host's name, which a path has not."""
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = "localhost", 0
        self.setup_environ()

    def get_request(self) -> tuple[socket.socket, tuple[str, int]]:
        """The connection, and where it is from: the handler wants a host."""
        return self.socket.accept()[0], ("localhost", 0)


class _SilentHandler(WSGIRequestHandler):
    def log_message(self, *_: object) -> None:
        """Polls are no news."""
