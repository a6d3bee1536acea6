"""GET from Redis straight into one buffer: values are megabytes, and a general client copies each several times.

Speaks just enough of RESP2 for AUTH, SELECT and GET, over connections of its own. The bytes of a value go from the
socket into the buffer that is handed out. Knows nothing of keys, of records or of what a failure means.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

import redis.asyncio as aioredis
import structlog
from redis.asyncio.connection import SSLConnection
from redis.asyncio.sentinel import SentinelConnectionPool
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse, ResponseError

if TYPE_CHECKING:
    from lookonce.core.stores.redis import RedisSettings

log = structlog.get_logger(__name__)
_LINE_BYTES: Final = 512
"""The longest first line of a reply; also the most of a value that is copied, when it arrives with its length."""


class ValueReader:
    """Reads values from the server that `client`, of one server or of Sentinels, talks to, with its credentials.

    Keeps as many connections as there were ever gets at once: bounding those is the caller's. Runs on one event loop.
    """

    def __init__(self, client: aioredis.Redis, settings: RedisSettings) -> None:
        pool: Any = client.connection_pool
        arguments = pool.connection_kwargs
        self._settings = settings
        self._pool = pool
        self._login: list[tuple[bytes, ...]] = []
        user, password = arguments.get("username"), arguments.get("password")
        if user or password:
            parts = (user, password or "") if user else (password,)
            self._login.append((b"AUTH", *(part.encode() for part in parts)))
        if number := arguments.get("db"):
            self._login.append((b"SELECT", b"%d" % number))
        self._locate: Callable[[], Awaitable[tuple[str, int]]] = self._fixed_address
        if isinstance(pool, SentinelConnectionPool):
            self._locate = pool.get_master_address
        self._connections: set[_Connection] = set()
        self._idle: list[_Connection] = []
        self._closed = False

    async def get(self, name: str) -> memoryview | None:
        """The value at `name`, read-only; None when there is none or it is over the size limit.

        A connection that was dropped while idle is replaced once. Raises RedisError or OSError.
        """
        command = (b"GET", name.encode())
        connection = self._take_idle()
        if connection is not None:
            try:
                return await self._ask(connection, command)
            except RedisConnectionError:
                for other in self._idle:  # the server that dropped one has most likely dropped all
                    other.abort()
                self._idle.clear()
        return await self._ask(await self._connect(), command)

    async def close(self) -> None:
        """Drop every connection; gets under way fail."""
        self._closed = True
        connections = list(self._connections)
        for connection in connections:
            connection.abort()
        for connection in connections:
            await connection.lost.wait()

    async def _ask(self, connection: _Connection, command: tuple[bytes, ...]) -> memoryview | None:
        value = await connection.ask(command, self._settings.socket_timeout)
        if connection.usable:
            self._idle.append(connection)
        return value

    def _take_idle(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
        return None

    async def _connect(self) -> _Connection:
        async with asyncio.timeout(self._settings.connect_timeout):
            host, port = await self._locate()
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: _Connection(self._connections, self._settings.max_value_bytes), host, port, ssl=self._tls()
            )
            for command in self._login:
                await connection.ask(command, self._settings.connect_timeout)
        if self._closed:
            connection.abort()
            raise RedisConnectionError("closed meanwhile")
        return connection

    async def _fixed_address(self) -> tuple[str, int]:
        arguments = self._pool.connection_kwargs
        return arguments.get("host", "localhost"), int(arguments.get("port", 6379))

    def _tls(self) -> ssl.SSLContext | None:
        if not issubclass(self._pool.connection_class, SSLConnection):
            return None
        context: ssl.SSLContext = self._pool.make_connection().ssl_context.get()  # shared with the client's connections
        return context


class _Connection(asyncio.BufferedProtocol):
    """One connection, one question at a time. In `connections` while it is up."""

    def __init__(self, connections: set[_Connection], max_value_bytes: int) -> None:
        self.lost = asyncio.Event()
        self._connections = connections
        self._max_value_bytes = max_value_bytes
        self._transport: Any = None
        self._answer: asyncio.Future[memoryview | None] | None = None
        self._timeout: asyncio.Timeout | None = None
        self._seconds = 0.0  # between two arrivals
        self._line = bytearray(_LINE_BYTES)
        self._value: bytearray | None = None  # with the two bytes that end it; None: the first line is being read
        self._got = 0  # bytes of the line or value

    @property
    def usable(self) -> bool:
        """Whether it was neither lost nor given up."""
        return not self._transport.is_closing()

    async def ask(self, command: tuple[bytes, ...], timeout: float) -> memoryview | None:
        """The answer's value (None: nil or a mere OK). `timeout`: seconds between two arrivals.

        Whatever goes wrong ends the connection: what may still arrive must not answer the next question.
        """
        if not self.usable:
            raise RedisConnectionError("the connection was lost")
        self._answer, self._seconds = asyncio.get_running_loop().create_future(), timeout
        parts = [b"*%d\r\n" % len(command), *(b"$%d\r\n%b\r\n" % (len(part), part) for part in command)]
        try:
            self._write(b"".join(parts))
            async with asyncio.timeout(timeout) as self._timeout:
                return await self._answer
        except BaseException:
            self.abort()
            raise
        finally:
            self._answer = self._timeout = None

    def _write(self, data: bytes) -> None:
        try:
            self._transport.write(data)
        except RuntimeError as error:  # uvloop's transport, closed by the peer a moment ago
            raise RedisConnectionError("the connection was lost") from error

    def abort(self) -> None:
        """End the connection without ceremony."""
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._connections.add(self)
        with contextlib.suppress(OSError):  # the peer has gone already: it will be told
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)
        self.lost.set()
        self._fail(RedisConnectionError("the connection was lost"))

    def get_buffer(self, sizehint: int) -> memoryview:
        """See asyncio.BufferedProtocol: where the next bytes belong."""
        return memoryview(self._line if self._value is None else self._value)[self._got :]

    def buffer_updated(self, nbytes: int) -> None:
        if self._answer is None:
            self.abort()  # nobody asked
            return
        self._got += nbytes
        if self._timeout is not None and not self._timeout.expired():
            self._timeout.reschedule(asyncio.get_running_loop().time() + self._seconds)
        if self._value is None:
            self._read_line()
        elif self._got == len(self._value):
            self._finish()

    def _read_line(self) -> None:
        end = self._line.find(b"\r\n", 0, self._got)
        if end < 0:
            if self._got == len(self._line):
                self._fail(_too_long(self._line))
            return
        kind, text, rest = self._line[:1], bytes(self._line[1:end]), self._line[end + 2 : self._got]
        if kind == b"$" and text.isdigit():
            self._begin_value(int(text), rest)
        elif (kind == b"+" or (kind == b"$" and text == b"-1")) and not rest:
            self._done(None)
        elif kind == b"-":
            self._fail(ResponseError(text.decode(errors="replace")))
        else:
            self._fail(InvalidResponse("a reply is malformed"))

    def _begin_value(self, size: int, start: bytearray) -> None:
        if size > self._max_value_bytes:
            log.warning("a stored value is over max_value_bytes", bytes=size, limit=self._max_value_bytes)
            self._done(None)
            self.abort()  # rather than read it
            return
        if len(start) > size + 2:
            self._fail(InvalidResponse("a reply is followed by another"))
            return
        self._value = bytearray(size + 2)
        self._value[: len(start)] = start
        self._got = len(start)
        if self._got == len(self._value):
            self._finish()

    def _finish(self) -> None:
        value = self._value
        if value is None or not value.endswith(b"\r\n"):
            self._fail(InvalidResponse("a value is longer than was announced"))
        else:
            self._done(memoryview(value)[:-2].toreadonly())

    def _done(self, answer: memoryview | None) -> None:
        self._value, self._got = None, 0
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(answer)

    def _fail(self, error: Exception) -> None:
        self._value, self._got = None, 0
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)


def _too_long(line: bytearray) -> ResponseError | InvalidResponse:
    """What a reply means whose first line doesn't end within the buffer: protected mode refuses with a paragraph."""
    if line[:1] == b"-":
        return ResponseError(line[1:].decode(errors="replace"))
    return InvalidResponse("the first line of a reply is too long")
