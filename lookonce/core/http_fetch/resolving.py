"""From a host to the addresses that may be connected to: looked up once, every one of them checked."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address

from lookonce.core.http_fetch.addresses import Address, may_connect
from lookonce.core.http_fetch.fetch_policy import FetchPolicy
from lookonce.core.http_fetch.refusals import Reason, no_usable_address
from lookonce.core.http_fetch.target import Target

LookUp = Callable[[str, int], Sequence[str]]
"""Blocking: addresses of a host and port as text. Raises OSError for an unknown name."""
_THREADS = 8


def system_look_up(host: str, port: int) -> Sequence[str]:
    """Ask the system's resolver."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return tuple(dict.fromkeys(str(entry[4][0]) for entry in found))


class Resolver:
    """Looks names up in threads of its own: a slow name server stalls neither the event loop nor other work."""

    def __init__(self, policy: FetchPolicy, look_up: LookUp = system_look_up) -> None:
        self._policy = policy
        self._look_up = look_up
        self._threads = ThreadPoolExecutor(_THREADS, "look-up")

    async def addresses(self, target: Target, param: str) -> tuple[Address, ...]:
        """Where to connect. Raises FetchError when there is none, or when any one is not allowed: a name with a public
        and a private address is an attempt, not a choice."""
        if target.address is not None:
            found: tuple[Address, ...] = (target.address,)
        else:
            found = await self._named(target, param)
        if not all(may_connect(address, self._policy.networks) for address in found):
            raise no_usable_address(Reason.PRIVATE_ADDRESS, param, target.host)
        return found

    async def _named(self, target: Target, param: str) -> tuple[Address, ...]:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._policy.connect_timeout):
                texts = await loop.run_in_executor(self._threads, self._look_up, target.host, target.port)
            found = tuple(ip_address(text) for text in texts)
        except (OSError, ValueError) as error:  # TimeoutError is an OSError, UnicodeError a ValueError
            raise no_usable_address(Reason.UNRESOLVED, param, target.host) from error
        if not found:
            raise no_usable_address(Reason.UNRESOLVED, param, target.host)
        return found

    def close(self) -> None:
        """Take no more names."""
        self._threads.shutdown(wait=False, cancel_futures=True)
