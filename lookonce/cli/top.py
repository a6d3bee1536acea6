"""`lookonce top`: a live view of a running system, from what it tells Prometheus."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lookonce.cli.console import fail
from lookonce.cli.rundir import default_data_dir, find_running
from lookonce.errors import ErrorKind, LookonceError

if TYPE_CHECKING:
    from lookonce.cli.measurements import Reading

HELP = """Watch a running system: requests, latencies, what is reused, services, stores.

\b
  lookonce top
  lookonce top --url https://lookonce.example.org --api-key KEY
  lookonce top --also http://eyes:9090 --also http://words:9090
  lookonce top --once

Looks at the system at --url, else at the one that `lookonce up` runs on the data directory. Ctrl-C ends it.
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
    """Watch a system."""
    try:
        with closing(Watcher(url or _running(data_dir or default_data_dir()), api_key, also or [])) as watcher:
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
    with Live(shown, console=console, screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            before, now = now, watcher.read()
            live.update(frame(watcher.url, watcher.readiness(), now, before), refresh=True)


class Watcher:
    """Reads the gateway's and the services' measurements."""

    def __init__(self, url: str, api_key: str | None, also: list[str]) -> None:
        import httpx2

        self.url = url.rstrip("/")
        self._others = [f"{one.rstrip('/').removesuffix('/metrics')}/metrics" for one in also]
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._gateway = httpx2.Client(headers=headers, timeout=TIMEOUT)
        self._plain = httpx2.Client(timeout=TIMEOUT)  # the key is the gateway's alone

    def close(self) -> None:
        """Close the connections."""
        self._gateway.close()
        self._plain.close()

    def read(self) -> Reading:
        """All measurements now. Raises UNAVAILABLE for whoever doesn't answer with any."""
        from lookonce.cli.measurements import read

        texts = [_get(self._gateway, f"{self.url}/metrics"), *(_get(self._plain, url) for url in self._others)]
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


def _running(data_dir: Path) -> str:
    system = find_running(data_dir)
    if system is None:
        raise LookonceError(
            ErrorKind.UNAVAILABLE, f"no `lookonce up` runs on {data_dir}; name a gateway with --url, or a --data-dir"
        )
    return system.url


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("top", help=HELP)(top)
