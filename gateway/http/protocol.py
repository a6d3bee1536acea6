"""HTTP/1.1 connections: uvicorn's, with bounds for clients that send slowly, read nothing, or say too much. Refusals
made here, before any route, have the same shape as all others."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass, field
from typing import Any

import structlog
import uvicorn
from starlette.responses import Response
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from gateway.http.error_bodies import HttpRefusal, error_response
from gateway.metrics import CONNECTIONS, CONNECTIONS_ENDED, REQUESTS
from gateway.settings import GatewaySettings
from lookonce.core.errors import ErrorKind, LookonceError

MALFORMED = HttpRefusal(400, "invalid_request", "this is not a well-formed HTTP request")
log = structlog.get_logger(__name__)


@dataclass
class Connections:
    """All connections of a server."""

    settings: GatewaySettings
    most: int
    quiet: dict[Connection, None] = field(default_factory=dict)
    """Those that wait for their client to send, silent for longest first."""

    def admit(self, open_now: int) -> bool:
        """Whether there is room for one more, made by ending the one whose client was silent for longest."""
        if open_now <= self.most:
            return True
        victim = next(iter(self.quiet), None)
        if victim is None:
            return False
        victim.end("crowded")
        return True


class _Refused(Exception):
    """Ends the parser's work on what was received."""


class Connection(HttpToolsProtocol):
    """One connection."""

    def __init__(
        self,
        connections: Connections,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._all = connections
        self._settings = connections.settings
        self._head_bytes = 0  # of the request line and headers that are coming
        self._in_head = False
        self._refusal: LookonceError | None = None
        self._deaf = False  # what is received from now on is dropped
        self._answering: RequestResponseCycle | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None

    # what the transport calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        CONNECTIONS.set(len(self.connections))
        if self._all.admit(len(self.connections)):
            self._watch()
        else:
            self._refusal = LookonceError(ErrorKind.UNAVAILABLE, "the server has too many connections: try again")
            self.send_400_response("")

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answering is not None and not self._answering.response_complete:
            self._answering.disconnected = True  # uvicorn tells the newest of the requests alone
            self._answering.message_event.set()
        self.pipeline.clear()
        super().connection_lost(exc)
        CONNECTIONS.set(len(self.connections))
        self._all.quiet.pop(self, None)
        self._stop_head_timer()
        self._stop_send_timer()

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        before = self._in_head
        super().data_received(data)
        if self._deaf or self.transport.is_closing():
            return
        if self._in_head and before:
            self._head_bytes += len(data)
        if self._in_head and self._head_bytes > self._settings.max_header_bytes:
            self._refusal = _head_too_large(self._settings.max_header_bytes)
            self.send_400_response("")
            return
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_send_timer()

    # what the parser calls

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= self._settings.max_pipelined:
            self._hush()
            raise _Refused
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._head_bytes += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > self._settings.max_header_bytes:
            self._refusal = _head_too_large(self._settings.max_header_bytes)
            raise _Refused
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        if self._head_bytes > self._settings.max_header_bytes:
            self._refusal = _head_too_large(self._settings.max_header_bytes)
            raise _Refused
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing():
            self._watch()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    # answers without a route

    def send_400_response(self, msg: str) -> None:
        """Refuse what has no request to answer; never in the midst of an answer, which is then the last."""
        if self._deaf:
            return
        refusal, self._refusal = self._refusal or MALFORMED, None
        cycle = self.cycle
        if self.pipeline or (cycle is not None and not cycle.response_complete and cycle.response_started):
            self._hush()
            return
        if cycle is not None and not cycle.response_complete and not cycle.more_body:
            self._hush()  # its answer is still to come
            return
        self._deaf = True
        response = error_response(refusal)
        response.headers["x-request-id"] = request_id = "req_" + secrets.token_hex(12)
        REQUESTS.labels("unmatched", "other", str(response.status_code)).inc()
        log.info("request refused", status=response.status_code, reason=refusal.message, request_id=request_id)
        self.transport.write(_as_bytes(response))
        self.transport.close()

    def end(self, why: str) -> None:
        """Cut the connection: its client does not do its part."""
        CONNECTIONS_ENDED.labels(why).inc()
        self._all.quiet.pop(self, None)
        self._deaf = True
        self.transport.abort()

    def _hush(self) -> None:
        """Take no more requests; the connection ends with the last answer that is due."""
        self._deaf = True
        last = self.pipeline[0][0] if self.pipeline else self.cycle
        last.keep_alive = False
        CONNECTIONS_ENDED.labels("pipelined" if self.pipeline else "malformed").inc()

    # time

    def _watch(self) -> None:
        """Note whether it is the client's turn; for headers it has a limited time."""
        idle = self.cycle is None or self.cycle.response_complete
        self._all.quiet.pop(self, None)
        if idle or self._in_head or self.cycle.more_body:
            self._all.quiet[self] = None
        if not (self._in_head or (idle and self.timeout_keep_alive_task is None)):
            self._stop_head_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self._settings.header_timeout, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.transport.is_closing():
            return
        if not self._in_head:
            self.end("silent")
            return
        text = f"the request's headers took more than {self._settings.header_timeout:g} seconds (--header-timeout)"
        self._refusal = HttpRefusal(408, "request_timeout", text)
        CONNECTIONS_ENDED.labels("headers").inc()
        self.send_400_response("")

    def _await_reader(self, left: int) -> None:
        self._stop_send_timer()
        self._send_timer = self.loop.call_later(self._settings.send_timeout, self._look_at_reader, left)

    def _look_at_reader(self, before: int) -> None:
        left = self.transport.get_write_buffer_size()
        if left >= before:
            self.end("unread")
        else:
            self._await_reader(left)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_send_timer(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None


def _head_too_large(limit: int) -> HttpRefusal:
    text = f"the request line and headers are larger than {limit} bytes (the gateway's --max-header-bytes)"
    return HttpRefusal(431, "request_header_fields_too_large", text)


def _as_bytes(response: Response) -> bytes:
    headers = [header for header in response.raw_headers if header[0] != b"connection"]
    lines = [STATUS_LINE[response.status_code], *(b"%s: %s\r\n" % header for header in headers)]
    return b"".join([*lines, b"connection: close\r\n\r\n", bytes(response.body)])
