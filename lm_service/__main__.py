"""`python -m lm_service`: the language service."""

from __future__ import annotations

import structlog

from lm_service.settings import LanguageSettings
from lookonce import tracing
from lookonce.apart import apart
from lookonce.errors import LookonceError
from lookonce.process import keep_freed_memory, leave_after, wait_briefly
from lookonce.settings import command
from lookonce.telemetry import configure_logging

log = structlog.get_logger(__name__)


def run(settings: LanguageSettings) -> int:
    """Load the model and serve; the process's exit status."""
    configure_logging("language", settings.log_level, settings.log_format)
    wait_briefly()
    # Here and not above: --help and a mistyped flag answer before torch is imported.
    import uvloop

    from lm_service.service import load_model, serve, start_metrics

    try:
        tracing.export_spans("language", settings.trace_endpoint, share=settings.trace_share)
        start_metrics(settings)
        model = apart(load_model, settings)
        keep_freed_memory()
        uvloop.run(serve(settings, model))
    except LookonceError as error:
        log.error("cannot start", kind=error.kind.value, reason=error.message)
        return 1
    finally:
        tracing.flush_spans()
    return 0


if __name__ == "__main__":
    leave_after(command(LanguageSettings, run))
