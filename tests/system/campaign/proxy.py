"""A TCP proxy that lets a server refuse, reset, hang or answer by halves, on its own thread."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine
from typing import Any

from tests.ports import free_port

MODES = ("pass", "refuse", "reset", "hang", "half")
AT_ONCE = 1 << 16
_RESET_AT_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER on, for no time
START_SECONDS = 60.0


class Proxy:
    """`with Proxy(port) as proxy: ... proxy.port; proxy.set("hang")`. A mode holds for connections that are open, too.

    pass     bytes go through
    refuse   nobody listens; open connections are reset
    reset    every connection is reset with the first bytes of a reply
    hang     connections are taken; nothing goes through, nothing is closed
    half     half of the first bytes of a reply goes through, then the connection is closed
    """

    def __init__(self, backend: int) -> None:
        self.port = free_port()
        self._backend = backend
        self._mode = "pass"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._listener: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._transports: set[asyncio.Transport] = set()

    @property
    def url(self) -> str:
        """redis:// URL of the proxy."""
        return f"redis://127.0.0.1:{self.port}"

    def set(self, mode: str) -> None:
        """Change what happens to connections."""
        if mode not in MODES:
            raise ValueError(mode)
        self._run(self._set(mode))

    def __enter__(self) -> Proxy:
        self._thread.start()
        self._run(self._listen())
        return self

    def __exit__(self, *error: object) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(START_SECONDS)
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(START_SECONDS)

    async def _listen(self) -> None:
        self._listener = await asyncio.start_server(self._relay, "127.0.0.1", self.port, reuse_address=True)

    async def _set(self, mode: str) -> None:
        before, self._mode = self._mode, mode
        if mode == "hang":
            self._flowing.clear()
        else:
            self._flowing.set()
        if mode == "refuse" and self._listener is not None:
            self._listener.close()
            self._listener = None
        if mode == "refuse" or before == "hang":  # what hung has lost its place
            for writer in list(self._writers):
                _reset(writer)
        if mode != "refuse" and self._listener is None:
            await self._listen()

    async def _close(self) -> None:
        if self._listener is not None:
            self._listener.close()
        told: set[asyncio.Task[Any]] = set()
        while others := asyncio.all_tasks() - {asyncio.current_task()}:  # until those taken in last have begun, too
            for task in self._tasks - told:  # once each: the second time would cut short how it closes its ends
                task.cancel()
                told.add(task)
            await asyncio.wait(others, timeout=0.05)
        for transport in self._transports:  # also what was closed with bytes that nobody took
            transport.abort()
        await asyncio.sleep(0.05)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._transports.add(writer.transport)
        ends = {writer}
        copies: list[asyncio.Task[None]] = []
        try:
            backend_reader, backend_writer = await asyncio.open_connection("127.0.0.1", self._backend)
            ends.add(backend_writer)
            self._transports.add(backend_writer.transport)
            self._writers |= ends
            copies = [
                asyncio.create_task(self._copy(reader, backend_writer, replies=False)),
                asyncio.create_task(self._copy(backend_reader, writer, replies=True)),
            ]
            await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
        except OSError:
            pass  # the server itself is away: whoever came finds the connection closed
        finally:
            for copy in copies:
                copy.cancel()
            await asyncio.gather(*copies, return_exceptions=True)
            self._writers -= ends
            for end in ends:
                end.close()
            self._tasks.discard(task)

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, replies: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(AT_ONCE):
                await self._flowing.wait()
                if replies and self._mode == "reset":
                    _reset(writer)
                    return
                if replies and self._mode == "half":
                    writer.write(data[: len(data) // 2])
                    await writer.drain()
                    return
                writer.write(data)
                await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST, as a crash does."""
    end = writer.get_extra_info("socket")
    if end is not None and not writer.is_closing():
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)
        writer.transport.abort()
