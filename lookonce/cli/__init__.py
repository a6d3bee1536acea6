"""The command line. Imports nothing heavy: torch and transformers run only in the processes that it starts."""

from __future__ import annotations


def main() -> None:
    """Entry point of the `lookonce` console script."""
    from lookonce.cli.typer_app import app

    app()
