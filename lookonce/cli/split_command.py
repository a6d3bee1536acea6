"""`lookonce split`: the two halves of a checkpoint as directories, so that each machine holds only its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lookonce.cli.console import fail, say
from lookonce.core.errors import LookonceError
from lookonce.core.units import format_size

if TYPE_CHECKING:
    from lookonce.models.registry import Half

HELP = """Write OUT/vision and OUT/language, each a complete checkpoint directory of its half.

\b
  lookonce split ./Qwen2-VL-7B-Instruct ./halves
  lookonce split Qwen/Qwen2-VL-2B-Instruct ./halves --force
  lookonce up --model ./halves

Copy OUT/vision to the machines of the vision service and OUT/language to those of the language service. Embeddings are
the same as from the whole checkpoint: the halves state its identity and the digest of the vision weights. OUT appears
only once it is whole.
"""


def split(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Local directory or hub id of the whole checkpoint.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write; must be empty or not exist.")],
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier split in OUT.")] = False,
    revision: Annotated[str | None, typer.Option(metavar="VALUE", help="Branch, tag or commit of a hub id.")] = None,
) -> None:
    """Split a checkpoint, showing progress."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    from lookonce.models.checkpoint.split import split_checkpoint

    columns = (
        TextColumn("{task.description:<9}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeRemainingColumn(),
    )
    tasks: dict[Half, TaskID] = {}
    with Progress(*columns, console=Console(stderr=True)) as bar:

        def progress(half: Half, done: int, total: int) -> None:
            if half not in tasks:
                tasks[half] = bar.add_task(half.value, total=total)
            bar.update(tasks[half], completed=done)

        try:
            report = split_checkpoint(model, out, revision=revision, force=force, progress=progress)
        except LookonceError as error:
            bar.stop()
            fail(error.message)
    for half, path in report.paths.items():
        say(f"{half.value:<9} {format_size(report.weight_bytes[half]):>10}  {report.tensors[half]:>5} tensors  {path}")
    say(f"identity  {report.identity}")
    say(f"weights   {report.vision_weights} (of the vision half: what --encoder-weights takes)")
