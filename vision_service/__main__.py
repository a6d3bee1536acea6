"""`python -m vision_service`: the vision service."""

from __future__ import annotations

from functools import partial

from lookonce.core.process import keep_freed_memory, leave_after, return_freed_memory, serve_to_end, wait_briefly
from lookonce.core.settings import command
from lookonce.core.telemetry.logs import configure_logging, serve_metrics
from vision_service.settings import VisionSettings


def run(settings: VisionSettings) -> int:
    """Load the model and serve; the process's exit status."""
    configure_logging("vision", settings.log_level, settings.log_format, lasting=True)
    wait_briefly()
    # Here and not above: --help and a mistyped flag answer before torch is imported.
    import uvloop

    from vision_service.app import load, serve

    def load_and_serve() -> None:
        if settings.metrics_listen:
            serve_metrics(settings.metrics_listen)
        return_freed_memory()
        loaded = load(settings)
        keep_freed_memory()
        uvloop.run(serve(settings, loaded))

    return serve_to_end("vision", settings, load_and_serve)


if __name__ == "__main__":
    leave_after(partial(command(VisionSettings, run), prog_name="vision_service"))
