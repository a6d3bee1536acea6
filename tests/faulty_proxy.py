"""A TCP proxy that spoils what a server answers: resets, refusals, halves, garbage, errors, silence."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from types import TracebackType

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
FAULTS = (
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
    every second answer let through."""

    def __init__(self, port: int, *, seed: int = 0, slow: float = 0.05) -> None:
        self.fault = "none"
        self.connections = 0
        self._backend = port
        self._slow = slow
        self._random = random.Random(seed)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._open: set[socket.socket] = set()
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> FaultyProxy:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join(60)

    def drop_all(self) -> None:
        """Reset every connection, as a server does that is killed."""
        for connection in list(self._open):
            _reset(connection)

    def _draw(self, among: tuple[str, ...]) -> str:
        if self.fault != "mixed":
            return self.fault if self.fault in among else "none"
        return self._random.choice(among) if self._random.random() < 0.5 else "none"

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            fault = self._draw(("refuse", "reset_at_once"))
            if fault == "refuse":
                client.close()
            elif fault == "reset_at_once":
                _reset(client)
            else:
                threading.Thread(target=self._relay, args=(client,), daemon=True).start()

    def _relay(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._backend)) as server:
            self._open.add(client)
            back = threading.Thread(target=_copy, args=(client, server.sendall, server), daemon=True)
            back.start()
            with contextlib.suppress(OSError):
                _copy(server, lambda data: self._spoil(client, data), server)
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
            back.join()
        self._open.discard(client)

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


def _copy(source: socket.socket, to: Callable[[bytes], None], server: socket.socket) -> None:
    try:
        while data := source.recv(1 << 16):
            to(data)
    except OSError:
        pass
    finally:
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)


def _reset(connection: socket.socket) -> None:
    """Close such that the peer gets an RST."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RD)
    with contextlib.suppress(OSError):
        connection.close()
