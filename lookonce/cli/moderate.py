"""`lookonce moderate`: a folder, bucket or table of images through a policy."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lookonce.cli.console import fail, note, say
from lookonce.cli.rundir import default_data_dir, find_running
from lookonce.core.errors import ErrorKind, LookonceError, invalid
from lookonce.core.settings import load
from lookonce.core.units import split_list

if TYPE_CHECKING:
    from lookonce.moderation.batch.run_plan import Addresses, Plan
    from lookonce.moderation.batch.settings import ModerateSettings

INTERRUPTED = 130
Source = Annotated[str, typer.Argument(metavar="SOURCE", help="Directory, glob, list, table, tar, or s3:// gs://.")]
LATER = 75
"""EX_TEMPFAIL: a service stayed away; the same command goes on later."""

HELP = """Judge many images by a policy: a probability for each rule and image.

\b
  lookonce moderate images/ --policy policy.yaml --out results.parquet
  lookonce moderate 'shoes/**/*.jpg' --policy policy.yaml --out results.jsonl
  lookonce moderate urls.txt --policy policy.yaml --out results.parquet        a path or URL a line
  lookonce moderate items.parquet --column image --policy policy.yaml --out results.csv
  lookonce moderate 'shards/*.tar' --policy policy.yaml --out results/         webdataset
  lookonce moderate s3://bucket/uploads/ --policy policy.yaml --out results.parquet
  lookonce moderate images/ --policy policy.yaml --out r.parquet --dry-run   how long will it take?

SOURCE is a directory, a glob, a .txt list, a .jsonl, .csv or .parquet table, a .tar, or s3:// or gs:// of any of these.
It uses the services at --vision and --lm, else those that `lookonce up` runs on the data directory.

It may be killed at any time: the same command goes on where it stopped, and each image is in the results once. Equal
files are judged once. An image that can't be read is a row that says why. When a service is away, it waits. Results
of different policies, models or sources are never mixed.

`lookonce report results.parquet` makes a page to look at. Everything about policies: docs/moderation.md.
Exit status: 0 all done, 75 a service stayed away, 130 interrupted (both: run it again to go on), 1 an error.
"""


def moderate(flags: dict[str, Any]) -> int:
    """The command: `flags` are those given (None: not given)."""
    from lookonce.core.telemetry.logs import configure_logging
    from lookonce.moderation.batch.settings import ModerateSettings

    source = flags.pop("source")
    settings = load(ModerateSettings, flags)
    try:
        addresses = addresses_of(settings)
        if settings.ray is not None:
            from lookonce.moderation.batch.cluster import connect

            connect(settings.ray)
        configure_logging("moderate", settings.log_level)
        return _run(source, settings, addresses)
    except LookonceError as error:
        if error.kind is ErrorKind.UNAVAILABLE:
            fail(f"{error.message}. Run the same command again to go on.", code=LATER)
        fail(error.message)


def _run(source: str, settings: ModerateSettings, addresses: Addresses) -> int:
    import uvloop

    from lookonce.moderation.batch.estimate import estimate
    from lookonce.moderation.batch.progress import print_summary
    from lookonce.moderation.batch.results import Results
    from lookonce.moderation.batch.run import Run, prepare
    from lookonce.moderation.batch.run_plan import plan

    made = plan(source, settings, addresses)
    if settings.dry_run:
        say(uvloop.run(estimate(made)))
        return 0
    if prepare(made.output, made.manifest, restart=settings.restart):
        note(f"{made.output.out} is finished already")
        print_summary(made.policy, Results.at(made.output.out).counts())
        return 0
    run = Run(made.output, made.manifest)
    try:
        if run.dropped:
            note(f"{run.dropped:,} damaged entries of an earlier process were dropped, and are made again")
        if run.begun.rows:
            note(f"going on after {run.begun.rows:,} images")
        status = uvloop.run(_work(made, run))
    finally:
        run.close()
    if status == 0:
        say(f"results: {made.output.out}")
        print_summary(made.policy, Results.at(made.output.out).counts())
    return status


async def _work(made: Plan, run: Any) -> int:
    from lookonce.moderation.batch.progress import reporting
    from lookonce.moderation.batch.run_plan import working

    total, every = made.manifest.identity.count, made.settings.progress_seconds
    stopped = _stop_on_signals()
    with reporting(total, every, note, terminal=sys.stderr.isatty()) as report:
        if made.settings.ray is not None:
            from lookonce.moderation.batch.cluster import run_on_cluster

            tally = await run_on_cluster(made, run, report, stopped)
        else:
            async with working(made, run, report, stopped) as job:
                await job.work()
            tally = job.tally
        report.show(tally)
    if not await run.complete():
        note(f"stopped: {report.line(tally)}. Run the same command again to go on.")
        return INTERRUPTED
    await run.finish()
    return 0


def _stop_on_signals() -> Callable[[], bool]:
    """Whether a signal has come: the first lets what is under way finish, the second ends the command at once."""
    loop, work, come = asyncio.get_running_loop(), asyncio.current_task(), asyncio.Event()

    def signalled() -> None:
        if come.is_set() and work is not None:
            work.cancel()
            return
        note("finishing what is under way; once more to end at once")
        come.set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, signalled)
    return come.is_set


def addresses_of(settings: ModerateSettings) -> Addresses:
    """Where the services are. Raises INVALID_ARGUMENT when that can't be told."""
    from lookonce.core.rpc.tls import Tls
    from lookonce.moderation.batch.run_plan import Addresses
    from lookonce.moderation.batch.service_pool import Patience

    vision, language = settings.vision, settings.lm
    if bool(vision) != bool(language):
        raise invalid("--vision and --lm go together; without either, those of `lookonce up` are used", param="lm")
    if not vision:
        general = os.environ.get("LOOKONCE_DATA_DIR")  # as the other commands have it
        directory = settings.data_dir or (Path(general) if general else default_data_dir())
        running = find_running(directory)
        if running is None:
            text = f"nothing runs on {directory}: start `lookonce up`, or give --vision and --lm (or --data-dir)"
            raise LookonceError(ErrorKind.NOT_FOUND, text, param="data_dir")
        vision, language = (str(running.services[name]["address"]) for name in ("vision", "language"))
    tls = Tls(settings.tls_certificate, settings.tls_key, settings.tls_ca)
    return Addresses(
        split_list(vision),
        split_list(language),
        tls if tls.enabled else None,
        settings.connections,
        settings.scores,
        settings.reproducible,
        Patience(settings.patience, settings.call_timeout),
    )
