"""`lookonce doctor`: what this machine can run, and what to do about the rest."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lookonce.cli.console import say
from lookonce.cli.rundir import default_data_dir

if TYPE_CHECKING:
    from lookonce.cli.checks import Finding

HELP = """Check this machine, and the settings `lookonce up` would run with; nothing is downloaded or changed.

\b
  lookonce doctor
  lookonce doctor --model ./Qwen2-VL-7B-Instruct --store redis://localhost:6379
  lookonce doctor --model ./Qwen2-VL-7B-Instruct --engine vllm
  lookonce doctor --json

One line per check: ok, warn or fail, with the remedy. Exit status 1 when any fails.
"""
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def doctor(
    model: Annotated[
        str | None, typer.Option(envvar="LOOKONCE_MODEL", metavar="MODEL", help="Checkpoint to check.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(envvar="LOOKONCE_REVISION", metavar="VALUE", help="Of a hub id.")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(envvar="LOOKONCE_ADAPTER", metavar="ADAPTER", help="LoRA adapter merged into it.")
    ] = None,
    store: Annotated[str | None, typer.Option(envvar="LOOKONCE_STORE", metavar="URL", help="Store to reach.")] = None,
    host: Annotated[str, typer.Option(envvar="LOOKONCE_HOST", metavar="HOST", help="Gateway's address.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(envvar="LOOKONCE_PORT", metavar="PORT", min=0, max=65535, help="Gateway's port.")
    ] = 8000,
    data_dir: Annotated[
        Path | None, typer.Option(envvar="LOOKONCE_DATA_DIR", metavar="DIR", help="Data directory.")
    ] = None,
    engine: Annotated[
        str, typer.Option(envvar="LOOKONCE_LM_ENGINE", metavar="ENGINE", help="vllm: look at its environment, too.")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check this machine."""
    findings = examine(model, revision, adapter, store, host, port, data_dir or default_data_dir(), engine)
    if as_json:
        say(json.dumps([vars(finding) for finding in findings], indent=2, ensure_ascii=False))
    for finding in findings if not as_json else ():
        label = typer.style(f"{finding.status:<5}", fg=_COLOURS[finding.status])
        typer.echo(f"{label} {finding.check:<11} {finding.detail}")
        if finding.remedy:
            typer.echo(f"{'':<17} -> {finding.remedy}")
    raise typer.Exit(1 if any(finding.status == "fail" for finding in findings) else 0)


def examine(
    model: str | None,
    revision: str | None,
    adapter: str | None,
    store: str | None,
    host: str,
    port: int,
    directory: Path,
    engine: str = "auto",
) -> list[Finding]:
    """All findings, in the order of the report."""
    from lookonce.cli import checks
    from lookonce.core.telemetry.logs import configure_logging

    configure_logging("doctor", "error")  # a store's own warnings say no more than the finding
    torch = checks.torch_report()
    checkpoint, sizes = checks.check_checkpoint(model, revision, torch, adapter)
    store_findings = asyncio.run(checks.check_store(store)) if store else [checks.embedded_store(directory)]
    return [
        *checks.check_python(),
        *checks.check_torch(torch),
        *checks.check_cpu(),
        *checks.check_cuda(torch),
        *checkpoint,
        *(checks.check_vllm(model, revision, torch) if engine == "vllm" else ()),
        *checks.check_memory(sizes, torch),
        *checks.check_data_dir(directory),
        *store_findings,
        *checks.check_port(host, port, directory),
    ]
