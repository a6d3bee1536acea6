"""A TCP proxy that spoils what a server answers: resets, refusals, halves, garbage, errors, silence; or is away."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from types import TracebackType

from tests.ports import free_port

SECONDS = 60.0  # until all of its threads have ended
ERRORS = (
    b"-LOADING the dataset is being loaded into memory\r\n",
    b"-READONLY You can't write against a read only replica.\r\n",
    b"-OOM command not allowed when used memory > 'maxmemory'.\r\n",
    b"-MOVED 3999 127.0.0.1:1\r\n",
    b"-CLUSTERDOWN The cluster is down\r\n",
    b"-MASTERDOWN Link with MASTER is down\r\n",
    b"-NOAUTH Authentication required.\r\n",
)
GARBAGE = (
    b"HTTP/1.1 400 Bad Request\r\n\r\n",
    b"$x\r\n",
    b"*-7\r\n",
    b"\x00" * 64,
    b"$5\r\nab\r\n:\r\n",
    b":\xff\r\n",
    b"*1\r\n+x",
)
FAULTS = (  # of each connection and answer
    "none",
    "refuse",
    "reset_at_once",
    "reset",
    "close",
    "half",
    "half_reset",
    "garbage",
    "error",
    "slow",
    "silent",
)


class FaultyProxy:
    """In front of the server on `port`. `fault` names what happens to each answer; "mixed" draws one each time, with
    every second answer let through. Three more are for `set`: "hang" lets nothing through and closes nothing, with
    "away" nobody listens, and "gets" ends each connection that asks for a value, and no other."""

    def __init__(self, port: int, *, seed: int = 0, slow: float = 0.05) -> None:
        self.fault = "none"
        self.connections = 0
        self.port = free_port()
        self._backend = port
        self._slow = slow
        self._random = random.Random(seed)
        self._listener: socket.socket | None = None
        self._open: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()
        self._flowing = threading.Event()
        self._flowing.set()

    @property
    def url(self) -> str:
        """redis:// URL of the proxy."""
        return f"redis://127.0.0.1:{self.port}"

    def __enter__(self) -> FaultyProxy:
        self._listen()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.set("away")
        for thread in list(self._threads):
            thread.join(SECONDS)

    def set(self, fault: str) -> None:
        """Change the fault, for open connections too. Those that hung have lost their place, and are reset."""
        before, self.fault = self.fault, fault
        if fault == "away":
            self._hang_up()
        if fault == "hang":
            self._flowing.clear()
        if "away" in (fault, before) or before == "hang":
            self.drop_all()
        if fault != "hang":
            self._flowing.set()
        if fault != "away" and self._listener is None:
            self._listen()

    def _listen(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=128)
        self._begin(self._accept, self._listener)

    def _hang_up(self) -> None:
        if self._listener is not None:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None

    def _begin(self, work: Callable[[socket.socket], None], connection: socket.socket) -> None:
        def run() -> None:
            try:
                work(connection)
            finally:
                self._threads.discard(thread)

        thread = threading.Thread(target=run, daemon=True)
        self._threads.add(thread)
        thread.start()

    def drop_all(self) -> None:
        """Reset every connection, as a server does that is killed."""
        for connection in list(self._open):
            _reset(connection)

    def _draw(self, among: tuple[str, ...]) -> str:
        if self.fault != "mixed":
            return self.fault if self.fault in among else "none"
        return self._random.choice(among) if self._random.random() < 0.5 else "none"

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            self.connections += 1
            fault = self._draw(("refuse", "reset_at_once"))
            if fault == "refuse":
                client.close()
            elif fault == "reset_at_once":
                _reset(client)
            else:
                self._open.add(client)
                self._begin(self._relay, client)

    def _relay(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._backend)) as server:
            back = threading.Thread(target=self._copy, args=(client, self._asking(server), server), daemon=True)
            back.start()
            with contextlib.suppress(OSError):
                self._copy(server, lambda data: self._spoil(client, data), server)
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
            back.join()
        self._open.discard(client)

    def _copy(self, source: socket.socket, to: Callable[[bytes], None], server: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                self._flowing.wait()
                to(data)
        except OSError:
            pass
        finally:
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)

    def _asking(self, server: socket.socket) -> Callable[[bytes], None]:
        def send(data: bytes) -> None:
            if self.fault == "gets" and data.startswith(b"*2\r\n$3\r\nGET\r\n"):
                raise ConnectionError("as planned")
            server.sendall(data)

        return send

    def _spoil(self, client: socket.socket, data: bytes) -> None:
        fault = self._draw(FAULTS[3:])
        if fault in ("half", "half_reset"):
            client.sendall(data[: max(1, len(data) // 2)])
        if fault in ("reset", "half_reset"):
            _reset(client)
        if fault in ("close", "half"):
            client.shutdown(socket.SHUT_RDWR)
        if fault in ("reset", "half_reset", "close", "half"):
            raise ConnectionError("as planned")
        if fault == "garbage":
            data = self._random.choice(GARBAGE)
        elif fault == "error":
            data = self._random.choice(ERRORS)
        elif fault == "slow":
            time.sleep(self._slow)
        if fault != "silent":
            client.sendall(data)


def _reset(connection: socket.socket) -> None:
    """Close such that the peer gets an RST."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RD)
    with contextlib.suppress(OSError):
        connection.close()
