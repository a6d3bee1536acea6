"""`python -m lm_service`: the language service."""

from __future__ import annotations

from lm_service.settings import LanguageSettings
from lookonce.core.process import keep_freed_memory, leave_after, return_freed_memory, serve_to_end, wait_briefly
from lookonce.core.settings import command
from lookonce.core.telemetry.logs import configure_logging, serve_metrics


def run(settings: LanguageSettings) -> int:
    """Load the model and serve; the process's exit status."""
    configure_logging("language", settings.log_level, settings.log_format, lasting=True)
    wait_briefly()
    # Here and not above: --help and a mistyped flag answer before any of it is imported.
    import uvloop

    from lm_service.app import load, serve

    def load_and_serve() -> None:
        if settings.metrics_listen:
            serve_metrics(settings.metrics_listen)
        return_freed_memory()
        model = load(settings)
        keep_freed_memory()
        uvloop.run(serve(settings, model))

    return serve_to_end("language", settings, load_and_serve)


if __name__ == "__main__":
    leave_after(command(LanguageSettings, run))
