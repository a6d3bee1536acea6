"""`lookonce top`: a live view of a running system, from what it tells Prometheus."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lookonce.cli.console import fail
from lookonce.cli.network import base_url
from lookonce.cli.rundir import default_data_dir, find_running
from lookonce.core.errors import ErrorKind, LookonceError

if TYPE_CHECKING:
    from lookonce.cli.top_frame import Reading

HELP = """Watch a running system: requests, latencies, what is reused, services, stores.

\b
  lookonce top
  lookonce top --url https://lookonce.example.org --api-key KEY
  lookonce top --url http://gateway:8000 --also http://vision:9090 --also http://language:9090
  lookonce top --once

Looks at the system at --url, else at the one that `lookonce up` runs on the data directory, its services included.
q ends it, Ctrl-C too.
"""
TIMEOUT = 5.0


def top(
    url: Annotated[str | None, typer.Option(envvar="LOOKONCE_URL", metavar="URL", help="Gateway to watch.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="LOOKONCE_API_KEY", metavar="KEY", help="Key of a gateway that wants one.")
    ] = None,
    also: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="--metrics-listen of a service; may be repeated.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(envvar="LOOKONCE_DATA_DIR", metavar="DIR", help="Where `lookonce up` runs.")
    ] = None,
    interval: Annotated[float, typer.Option(min=0.2, metavar="SECONDS", help="Time between two frames.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print one frame, totals instead of rates, and end.")] = False,
) -> None:
    try:
        at, services = (url, []) if url is not None else _running(data_dir or default_data_dir())
        with closing(Watcher(at, api_key, also or [], services)) as watcher:
            _show(watcher, interval, once)
    except KeyboardInterrupt:
        return
    except LookonceError as error:
        fail(error.message)


def _show(watcher: Watcher, interval: float, once: bool) -> None:
    from rich.console import Console
    from rich.live import Live

    from lookonce.cli.top_frame import frame

    console, now = Console(), watcher.read()
    shown = frame(watcher.url, watcher.readiness(), now, None)
    if once:
        console.print(shown)
        return
    with keys() as pressed, Live(shown, console=console, screen=True, auto_refresh=False) as live:
        before = None
        while "q" not in pressed(interval).lower():
            try:
                before, now = now, watcher.read()
                readiness = watcher.readiness()
            except LookonceError:  # it may be starting again
                before, readiness = before or now, {}
            live.update(frame(watcher.url, readiness, now, before), refresh=True)


@contextmanager
def keys() -> Iterator[Callable[[float], str]]:
    """What waits so many seconds for keys and says which were pressed; without a terminal it only waits."""
    if not sys.stdin.isatty():
        yield _wait
        return
    import termios
    import tty

    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)

    def pressed(seconds: float) -> str:
        if not select.select([terminal], [], [], seconds)[0]:
            return ""
        return os.read(terminal, 64).decode("utf-8", "replace") or "q"  # the terminal is gone

    tty.setcbreak(terminal)
    try:
        yield pressed
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def _wait(seconds: float) -> str:
    time.sleep(seconds)
    return ""


class Watcher:
    """Reads the measurements of a gateway and of services: of those `also` (URLs), which must answer, and of those of
    `services` (metrics_listen) that answer at the moment."""

    def __init__(self, url: str, api_key: str | None, also: list[str], services: list[str]) -> None:
        import httpx2

        self.url = url.rstrip("/")
        self._others = [f"{one.rstrip('/').removesuffix('/metrics')}/metrics" for one in also]
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._gateway = httpx2.Client(headers=headers, timeout=TIMEOUT)
        self._plain = httpx2.Client(timeout=TIMEOUT)  # the key is the gateway's alone
        self._services = [_here(address) for address in services]

    def close(self) -> None:
        for client in (self._gateway, self._plain, *self._services):
            client.close()

    def read(self) -> Reading:
        """All measurements now. Raises UNAVAILABLE for whoever doesn't answer with any."""
        from lookonce.cli.top_frame import read

        texts = [_get(self._gateway, f"{self.url}/metrics"), *(_get(self._plain, url) for url in self._others)]
        for client in self._services:
            with suppress(LookonceError):
                texts.append(_get(client, "/metrics"))
        try:
            return read(texts, time.monotonic())
        except ValueError:
            raise LookonceError(ErrorKind.UNAVAILABLE, f"{self.url} doesn't answer with measurements") from None

    def readiness(self) -> dict[str, Any]:
        """The gateway's own word on its parts; empty when it doesn't answer."""
        import httpx2

        try:
            found: dict[str, Any] = self._gateway.get(f"{self.url}/readyz").json()
        except (httpx2.HTTPError, ValueError):
            return {}
        return found


def _here(address: str) -> Any:
    """A client of a process of this machine, which needs no proxy."""
    import httpx2

    if address.startswith("unix:"):
        transport = httpx2.HTTPTransport(uds=address.removeprefix("unix:"))
        return httpx2.Client(base_url="http://localhost", transport=transport, timeout=TIMEOUT, trust_env=False)
    host, _, port = address.rpartition(":")
    return httpx2.Client(base_url=base_url(host, int(port)), timeout=TIMEOUT, trust_env=False)


def _get(client: Any, url: str) -> str:
    import httpx2

    try:
        reply = client.get(url)
    except (httpx2.HTTPError, httpx2.InvalidURL):
        raise LookonceError(ErrorKind.UNAVAILABLE, f"cannot reach {url}") from None
    if reply.status_code == 401:
        raise LookonceError(ErrorKind.UNAUTHENTICATED, "the gateway wants a key: --api-key or LOOKONCE_API_KEY")
    if reply.status_code != 200:
        raise LookonceError(ErrorKind.UNAVAILABLE, f"{url} answered {reply.status_code}")
    return str(reply.text)


def _running(data_dir: Path) -> tuple[str, list[str]]:
    """The gateway's URL, and where its services answer with measurements."""
    system = find_running(data_dir)
    if system is None:
        raise LookonceError(
            ErrorKind.UNAVAILABLE, f"no `lookonce up` runs on {data_dir}; name a gateway with --url, or a --data-dir"
        )
    return system.url, [service["metrics"] for service in system.services.values() if service.get("metrics")]
