"""`lookonce report`: a page to look at the results of `lookonce moderate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lookonce.cli.console import fail, note, say
from lookonce.core.errors import LookonceError

HELP = """Write one HTML page about the results of `lookonce moderate`.

\b
  lookonce report results.parquet                    writes results.html
  lookonce report results/ --out page.html           parts in a folder, also of a run that is under way

It holds counts by rule, histograms of scores, thresholds to move, flagged images with their scores, errors and
duplicates: all inside the one file, nothing is loaded from anywhere. The images are read from the source again.
"""


def report(
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="What `lookonce moderate` wrote to --out.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The page; unset: RESULTS with .html.")] = None,
    gallery: Annotated[int, typer.Option(min=0, max=5000, metavar="N", help="Most images held in the page.")] = 200,
) -> None:
    from lookonce.core.telemetry.logs import configure_logging
    from lookonce.moderation.report.page import write_report

    configure_logging("report", "warning")  # stdout is for the result
    page = out or results.expanduser().absolute().with_suffix(".html")
    try:
        collected = write_report(results, page, gallery=gallery)
    except LookonceError as error:
        fail(error.message)
    except OSError as error:
        fail(f"{page}: cannot be written ({error.strerror})")
    so_far = "" if collected.finished else " so far"
    shown = f"{len(collected.cards)} of them in the page"
    say(f"{page}: {collected.rows:,} images{so_far}, {collected.flagged:,} flagged, {shown}")
    if collected.left_out:
        note(f"{collected.left_out:,} damaged rows or parts were left out: run `lookonce moderate` again to mend them")
