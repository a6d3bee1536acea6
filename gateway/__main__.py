"""`python -m gateway`: the gateway."""

from __future__ import annotations

from gateway.settings import GatewaySettings
from lookonce.core.process import leave_after, serve_to_end
from lookonce.core.settings import command
from lookonce.core.telemetry.logs import configure_logging


def run(settings: GatewaySettings) -> int:
    """Serve until told to stop; the process's exit status."""
    configure_logging("gateway", settings.log_level, settings.log_format, lasting=True)
    # Here and not above: --help and a mistyped flag answer at once.
    import uvloop

    from gateway.app import serve

    return serve_to_end("gateway", settings, lambda: uvloop.run(serve(settings)))


if __name__ == "__main__":
    leave_after(command(GatewaySettings, run))
