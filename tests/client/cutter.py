"""A TCP relay in front of a server that cuts connections on purpose: what a failing network does to a client."""

from __future__ import annotations

import contextlib
import socket
import threading
from types import TracebackType
from urllib.parse import urlsplit


class Cutter:
    """Relays to `url` ("http://..." or "unix:/path"). Each connection is cut once the server has sent
    `after(number of connection)` bytes."""

    def __init__(self, url: str, *after: int | None) -> None:
        self._target = url
        self._after = after  # the last holds for all further connections; None: never
        self.requests: list[bytes] = []  # first line of each request
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Cutter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            for number in range(1000):
                near, _ = self._listener.accept()
                limit = self._after[min(number, len(self._after) - 1)]
                far = _connect(self._target)
                threading.Thread(target=self._up, args=(near, far), daemon=True).start()
                threading.Thread(target=self._down, args=(far, near, limit), daemon=True).start()

    def _up(self, near: socket.socket, far: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := near.recv(65536):
                if data.startswith((b"GET ", b"POST ", b"DELETE ")):
                    self.requests.append(data.split(b" HTTP/", 1)[0])
                far.sendall(data)
            far.shutdown(socket.SHUT_WR)

    def _down(self, far: socket.socket, near: socket.socket, limit: int | None) -> None:
        sent = 0
        with far, near, contextlib.suppress(OSError):
            while data := far.recv(65536):
                data = data if limit is None else data[: limit - sent]
                near.sendall(data)
                sent += len(data)
                if sent == limit:
                    break
            with contextlib.suppress(OSError):
                near.shutdown(socket.SHUT_RDWR)


def _connect(url: str) -> socket.socket:
    if url.startswith("unix:"):
        far = socket.socket(socket.AF_UNIX)
        far.connect(url.removeprefix("unix:"))
        return far
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port))
