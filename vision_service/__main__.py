"""`python -m vision_service`: the vision service."""

from __future__ import annotations

from functools import partial

import structlog

from lookonce import tracing
from lookonce.errors import LookonceError
from lookonce.process import leave_after, wait_briefly
from lookonce.settings import command
from lookonce.telemetry import configure_logging
from vision_service.settings import VisionSettings

log = structlog.get_logger(__name__)


def run(settings: VisionSettings) -> int:
    """Exit status: 0 after a drain, 1 when the service can't start."""
    configure_logging("vision", settings.log_level, settings.log_format)
    wait_briefly()
    # Here and not above: --help and a mistyped flag answer before torch is imported.
    import uvloop

    from vision_service.serving import serve

    try:
        tracing.export_spans("vision", settings.trace_endpoint, share=settings.trace_share)
        uvloop.run(serve(settings))
    except LookonceError as error:
        log.error("cannot start", reason=error.message)
        return 1
    finally:
        tracing.flush_spans()
    return 0


if __name__ == "__main__":
    leave_after(partial(command(VisionSettings, run), prog_name="vision_service"))
