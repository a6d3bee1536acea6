"""A real service that an image kills, and that is started again each time, as a supervisor would.

Between client and service stands a proxy that copies bytes. When the client sends the marker, the service gets SIGKILL:
what the client sees is what a native crash or an out-of-memory kill would have shown it.
"""

from __future__ import annotations

import asyncio
import tempfile
import threading
from pathlib import Path

from tests.processes import ServiceProcess

MARKER = b"this image kills those who look at it"


class MortalService:
    """`service`, reached at `address`; it dies of `marker`. As a context manager it runs both."""

    def __init__(self, service: ServiceProcess, marker: bytes) -> None:
        self.service = service
        self.marker = marker
        self.deaths = 0
        self._folder = tempfile.TemporaryDirectory(prefix="lookonce-test-")
        self.address = f"unix:{self._folder.name}/front.sock"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._supervising: asyncio.Task[None] | None = None

    def __enter__(self) -> MortalService:
        self.service.__enter__()
        self._thread.start()
        self._server = self._run(asyncio.start_unix_server(self._serve, self.address.removeprefix("unix:")))
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self.service.close()
        self._folder.cleanup()

    def _run(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    async def _end(self) -> None:
        self._server.close()
        if self._supervising is not None:
            await self._supervising
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, onward = await asyncio.open_unix_connection(self.service.address.removeprefix("unix:"))
        except OSError:  # it is dead, or not up yet
            writer.close()
            return
        pumps = [asyncio.create_task(self._pump(reader, onward, self.marker))]
        pumps.append(asyncio.create_task(self._pump(there, writer, None)))
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            for end in (writer, onward):
                end.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, marker: bytes | None) -> None:
        tail = b""
        while data := await reader.read(1 << 16):
            if marker is not None and marker in tail + data:
                self._die()
                return
            tail = data[-100:]
            writer.write(data)
            await writer.drain()

    def _die(self) -> None:
        self.deaths += 1
        self.service.kill()
        if self._supervising is None or self._supervising.done():
            self._supervising = self._loop.create_task(self._supervise())

    async def _supervise(self) -> None:
        """Until it is up, however often it dies of a client who was there before the supervisor saw it ready."""
        restarted_after = 0
        while restarted_after < self.deaths:
            restarted_after = self.deaths
            try:
                await self._loop.run_in_executor(None, self.service.restart)
            except AssertionError:
                if restarted_after == self.deaths:  # it ended by itself
                    raise


def poisoned(image: Path, marker: bytes) -> bytes:
    """The image with the marker in it, twice: one of them is in one piece however the file is cut into frames."""
    return image.read_bytes() + marker + bytes(200) + marker
