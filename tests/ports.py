"""Ports for servers that tests start later, or again: nobody else is given one of them meanwhile."""

from __future__ import annotations

import socket


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on, kept for this process until it ends.

    It stays bound, not listening: the kernel gives it to no other socket that takes any port, while a server that sets
    SO_REUSEADDR, as all do, can still listen there. Until then connections are refused.
    """
    kept = socket.socket()
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    kept.bind(("127.0.0.1", 0))
    port: int = kept.getsockname()[1]
    kept.detach()  # open as long as the process is
    return port
