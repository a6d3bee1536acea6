"""How far a run is: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from lookonce.moderation.batch.results import Counts
from lookonce.moderation.batch.work_loop import Tally
from lookonce.moderation.policy import Policy

_WINDOW_SECONDS = 30.0  # of the rate


def duration(seconds: float | None) -> str:
    """ "1:02:03", "4:05", "?"."""
    if seconds is None:
        return "?"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Reporter:
    """Call it with the tally after each row."""

    def __init__(self, bar: Progress, total: int | None, every: float, say: Callable[[str], None] | None) -> None:
        """Lines go to `say` every so many seconds; without it, into the bar."""
        self._bar = bar
        bar.add_task("starting", total=total)
        [self._task] = bar.tasks
        self._every = every
        self._say = say
        self._last = time.monotonic()

    def __call__(self, tally: Tally) -> None:
        self._bar.update(self._task.id, completed=tally.done)
        now = time.monotonic()
        if now - self._last >= self._every:
            self._last = now
            self.show(tally)

    def show(self, tally: Tally) -> None:
        if self._say is not None:
            self._say(self.line(tally))
        else:
            self._bar.update(self._task.id, description=self.line(tally))

    def line(self, tally: Tally) -> str:
        """All of it in words."""
        total = self._task.total
        of = f" of {total:,}" if total is not None else ""
        share = tally.flagged / max(1, tally.done - tally.failed)
        parts = [
            f"{tally.done:,}{of} images",
            f"{self._task.speed or 0:.1f}/s",
            f"{share:.1%} flagged",
            f"{tally.failed:,} errors",
            f"{tally.duplicates:,} duplicates",
        ]
        if total is not None:
            parts.append(f"{duration(self._task.time_remaining)} left")
        return ", ".join(parts)


@contextmanager
def reporting(total: int | None, every: float, say: Callable[[str], None], *, terminal: bool) -> Iterator[Reporter]:
    """What to call while the block runs: a bar in a terminal; elsewhere `say` is given a line every so many seconds."""
    columns = (BarColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True)
    with Progress(*columns, console=console, speed_estimate_period=_WINDOW_SECONDS, disable=not terminal) as bar:
        yield Reporter(bar, total, 0.2 if terminal else every, None if terminal else say)


def print_summary(policy: Policy, counts: Counts) -> None:
    """The end of a run in a table, to stdout."""
    table = Table(box=None, pad_edge=False)
    for name, align in (("rule", "left"), ("severity", "left"), ("threshold", "right"), ("fired", "right"),
                        ("of", "right"), ("share", "right")):  # fmt: skip
        table.add_column(name, justify=align)  # type: ignore[arg-type]
    for rule in policy.of("image"):
        fired, asked = counts.fired[rule.id], counts.asked[rule.id]
        share = f"{fired / asked:.1%}" if asked else "-"
        table.add_row(rule.id, rule.severity, f"{rule.threshold:g}", f"{fired:,}", f"{asked:,}", share)
    console = Console(highlight=False)
    console.print(table)
    errors = ", ".join(f"{kind} {count:,}" for kind, count in sorted(counts.errors.items())) or "none"
    console.print(
        f"{counts.rows:,} images, {counts.flagged:,} flagged, {counts.duplicates:,} duplicates; errors: {errors}"
    )
