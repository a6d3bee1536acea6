"""The end of a run in a table."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from lookonce.moderation.batch.results import Counts
from lookonce.moderation.policy import Policy


def print_summary(policy: Policy, counts: Counts) -> None:
    """To stdout."""
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
        f"{counts.rows:,} pictures, {counts.flagged:,} flagged, {counts.duplicates:,} duplicates; errors: {errors}"
    )
