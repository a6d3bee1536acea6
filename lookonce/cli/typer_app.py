"""The commands; a module's heavy imports wait until its command runs."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable
from typing import Annotated

import typer

from lookonce.cli import ask, demo, doctor, moderate, plan_command, report, split_command, top, up, verify_command
from lookonce.cli.console import say
from lookonce.core.settings import with_options
from lookonce.core.version import __version__
from lookonce.moderation.batch.settings import ModerateSettings

HELP = """Split serving for vision-language models: encode an image once, ask it anything, many times.

\b
  lookonce demo                         see it work, with nothing to download
  lookonce up --model DIR_OR_HUB_ID     start serving
  lookonce ask photo.jpg -q "What is this?"
  lookonce moderate images/ --policy policy.yaml --out results.parquet
  lookonce report results.parquet       a page to look at
  lookonce doctor --model DIR_OR_HUB_ID what this machine can run, and what to do about the rest

`lookonce COMMAND --help` shows every setting with its environment variable and default.
"""

app = typer.Typer(
    name="lookonce",
    help=HELP,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def _print_version(asked: bool) -> None:
    if asked:
        say(f"lookonce {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """What comes before a command."""


@app.command("version")
def version() -> None:
    """Print the versions of lookonce and of what its answers depend on."""
    say(f"lookonce {__version__}")
    say(f"python {platform.python_version()}")
    for package in ("torch", "transformers", "grpcio", "safetensors"):
        try:
            say(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            say(f"{package} not installed")


COMMANDS: tuple[tuple[str, str, Callable[..., None]], ...] = (
    ("up", up.HELP, with_options(up.UpSettings, up.up)),
    ("ask", ask.HELP, ask.ask),
    ("moderate", moderate.HELP, with_options(ModerateSettings, moderate.moderate, source=moderate.Source)),
    ("report", report.HELP, report.report),
    ("split", split_command.HELP, split_command.split),
    ("verify", verify_command.HELP, verify_command.verify),
    ("plan", plan_command.HELP, plan_command.plan),
    ("top", top.HELP, top.top),
    ("doctor", doctor.HELP, doctor.doctor),
    ("demo", demo.HELP, demo.demo),
)
for name, text, call in COMMANDS:
    app.command(name, help=text)(call)
