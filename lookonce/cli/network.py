"""Ports and addresses of this machine."""

from __future__ import annotations

import errno
import socket
import sys

from lookonce.core.errors import ErrorKind, LookonceError, invalid

_ANY = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1", "[::]": "::1"}


def check_port_free(host: str, port: int) -> None:
    """Raises CONFLICT when something listens there, INVALID_ARGUMENT for an address this machine doesn't have."""
    try:
        bind(host, port).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise LookonceError(
                ErrorKind.CONFLICT,
                f"port {port} on {host} is in use; stop what listens there, or choose another --port (0: any free one)",
                param="port",
            ) from None
        if error.errno == errno.EACCES:
            raise LookonceError(
                ErrorKind.PERMISSION_DENIED, f"port {port} needs privileges; choose one above 1023", param="port"
            ) from None
        raise invalid(f"--host={host}: not an address of this machine", param="host") from None


def take_port(host: str = "127.0.0.1") -> int:
    """A free port, kept for a child of this process, which may listen there, and again after it ended.

    It stays bound, not listening, until this process ends: the kernel gives it to nobody else who takes any port, while
    a server that sets SO_REUSEADDR, as all do, can listen there. Outside Linux it couldn't: there the port is let go.
    """
    with bind(host, 0) as kept:
        port = int(kept.getsockname()[1])
        if sys.platform == "linux":
            kept.detach()
    return port


def bind(host: str, port: int) -> socket.socket:
    """A bound, not listening, socket; raises OSError."""
    bare = host.strip("[]")
    family = socket.getaddrinfo(bare or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
    probe = socket.socket(family, socket.SOCK_STREAM)
    try:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: TIME_WAIT doesn't count as in use
        probe.bind((bare, port))
    except BaseException:
        probe.close()
        raise
    return probe


def base_url(host: str, port: int, *, tls: bool = False) -> str:
    """The URL by which this machine reaches a server bound to host and port."""
    reachable = _ANY.get(host, host).strip("[]")
    shown = f"[{reachable}]" if ":" in reachable else reachable
    return f"{'https' if tls else 'http'}://{shown}:{port}"
