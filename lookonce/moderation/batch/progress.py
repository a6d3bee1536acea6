"""How far a run is: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lookonce.moderation.batch.results import Counts
from lookonce.moderation.batch.work_loop import Tally
from lookonce.moderation.policy import Policy

_WINDOW_SECONDS = 30.0


class Meter:
    """Rate over the last half minute, and what follows from it."""

    def __init__(self, total: int | None) -> None:
        self.total = total
        self._seen: deque[tuple[float, int]] = deque()

    def update(self, done: int, now: float | None = None) -> None:
        now = time.monotonic() if now is None else now
        if not self._seen or now - self._seen[-1][0] > 0.25:
            self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[0][0] > _WINDOW_SECONDS:
            self._seen.popleft()

    @property
    def rate(self) -> float:
        """Rows a second."""
        if len(self._seen) < 2:
            return 0.0
        (began, first), (ended, last) = self._seen[0], self._seen[-1]
        return (last - first) / max(ended - began, 1e-6)

    def remaining(self, done: int) -> float | None:
        """Seconds, or None while unknown."""
        if self.total is None or not self.rate:
            return None
        return max(0, self.total - done) / self.rate


def duration(seconds: float | None) -> str:
    """ "1:02:03", "4:05", "?"."""
    if seconds is None:
        return "?"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def line(tally: Tally, meter: Meter) -> str:
    """All of it in words."""
    of = f" of {meter.total:,}" if meter.total is not None else ""
    share = tally.flagged / max(1, tally.done - tally.failed)
    parts = [
        f"{tally.done:,}{of} images",
        f"{meter.rate:.1f}/s",
        f"{share:.1%} flagged",
        f"{tally.failed:,} errors",
        f"{tally.duplicates:,} duplicates",
    ]
    if meter.total is not None:
        parts.append(f"{duration(meter.remaining(tally.done))} left")
    return ", ".join(parts)


class Reporter:
    """Call it with the tally after each row."""

    def __init__(self, total: int | None, every: float, say: Callable[[str], None]) -> None:
        self.meter = Meter(total)
        self._every = every
        self._say = say
        self._last = time.monotonic()

    def __call__(self, tally: Tally) -> None:
        self.meter.update(tally.done)
        now = time.monotonic()
        if now - self._last >= self._every:
            self._last = now
            self.show(tally, self.meter)

    def show(self, tally: Tally, meter: Meter) -> None:
        self._say(line(tally, meter))


@contextmanager
def reporting(total: int | None, every: float, say: Callable[[str], None], *, terminal: bool) -> Iterator[Reporter]:
    """What to call while the block runs: a bar in a terminal; elsewhere `say` is given a line every so many seconds."""
    if not terminal:
        yield Reporter(total, every, say)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    with Progress(BarColumn(), TextColumn("{task.description}"), console=Console(stderr=True)) as bar:
        task = bar.add_task("starting", total=total)

        class Bar(Reporter):
            def show(self, tally: Tally, meter: Meter) -> None:
                bar.update(task, completed=tally.done, description=line(tally, meter))

        yield Bar(total, 0.2, say)


def print_summary(policy: Policy, counts: Counts) -> None:
    """The end of a run in a table, to stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name, align in (("rule", "left"), ("severity", "left"), ("threshold", "right"), ("fired", "right"),
                        ("of", "right"), ("share", "right")):  # fmt: skip
        table.add_column(name, justify=align)  # type: ignore[arg-type]
    for rule in policy.rules:
        if "image" not in rule.applies_to:
            continue
        fired, asked = counts.fired[rule.id], counts.asked[rule.id]
        share = f"{fired / asked:.1%}" if asked else "-"
        table.add_row(rule.id, rule.severity, f"{rule.threshold:g}", f"{fired:,}", f"{asked:,}", share)
    console = Console(highlight=False)
    console.print(table)
    errors = ", ".join(f"{kind} {count:,}" for kind, count in sorted(counts.errors.items())) or "none"
    console.print(
        f"{counts.rows:,} images, {counts.flagged:,} flagged, {counts.duplicates:,} duplicates; errors: {errors}"
    )
