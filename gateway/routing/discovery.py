"""Endpoints found by DNS: a name is looked up again and again, and its replicas follow what it stands for."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic

import structlog

from gateway.routing.replicas import C, Replicas
from lookonce.core.errors import invalid
from lookonce.core.tasks import keep_running

PREFIX = "dns://"
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""The addresses ("192.0.2.1", "2001:db8::1") of a host. Raises OSError when they can't be told."""
log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Name:
    """A host whose every address is an endpoint."""

    host: str
    port: int


async def resolve(host: str, port: int) -> list[str]:
    """The system's resolver, off the event loop."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


def split_targets(targets: Sequence[str]) -> tuple[list[str], list[Name]]:
    """Addresses to be taken as they are, and names to be looked up (dns://HOST:PORT). Raises INVALID_ARGUMENT."""
    fixed = [target for target in targets if not target.startswith(PREFIX)]
    return fixed, [_parse(target) for target in targets if target.startswith(PREFIX)]


def open_replicas(
    targets: Sequence[str], connect: Callable[[str, str | None], C], *, interval: float
) -> tuple[Replicas[C], Discovery[C]]:
    """The replicas at these addresses, and what keeps them in step with the names among them. `connect`: see
    `Discovery`. Raises INVALID_ARGUMENT."""
    fixed, names = split_targets(targets)
    replicas = Replicas([connect(address, None) for address in fixed])
    return replicas, Discovery(replicas, names, connect, interval=interval)


def _parse(target: str) -> Name:
    host, colon, port = target.removeprefix(PREFIX).strip("/").rpartition(":")
    if not host or not colon or "/" in host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise invalid(f"{target!r} must be {PREFIX}HOST:PORT")
    return Name(host, int(port))


class Discovery(Generic[C]):
    """Keeps the replicas of one service in step with the names it is known by."""

    def __init__(
        self,
        replicas: Replicas[C],
        names: Sequence[Name],
        connect: Callable[[str, str | None], C],
        *,
        interval: float,
        resolve: Resolve = resolve,
    ) -> None:
        """`connect` makes a client of an address ("192.0.2.1:50052") and the name it was found by, which a
        certificate must be for. `interval` is in seconds."""
        self._replicas = replicas
        self._names = tuple(names)
        self._connect = connect
        self._interval = interval
        self._resolve = resolve
        self._found: dict[Name, frozenset[str]] = {}
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Look all names up once, then again in the background. A name that can't be looked up has no endpoints yet."""
        if self._names:
            await self.refresh()
            self._task = keep_running(self._run)

    async def refresh(self) -> None:
        """Look all names up; a name that can't be looked up keeps the endpoints it had."""
        await asyncio.gather(*(self._look_up(name) for name in self._names))

    async def close(self) -> None:
        """Stop looking."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            await self.refresh()
            await self._replicas.close_idle()

    async def _look_up(self, name: Name) -> None:
        try:
            found = frozenset(_address(host, name.port) for host in await self._resolve(name.host, name.port))
        except OSError:
            log.warning(
                "name not resolved, its endpoints stay", name=name.host, endpoints=len(self._found.get(name, ()))
            )
            return
        known = self._found.get(name, frozenset())
        self._found[name] = found
        others = frozenset[str]().union(*(there for other, there in self._found.items() if other != name))
        for address in sorted(found - known - others):
            self._replicas.add(self._connect(address, name.host))
        for address in known - found - others:
            self._replicas.remove(address)
        if found != known:
            log.info("endpoints changed", name=name.host, added=len(found - known), removed=len(known - found))


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
