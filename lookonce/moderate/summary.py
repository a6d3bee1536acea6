"""The end of a run in a table."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lookonce.moderate.columns import FIRED, SCORE
from lookonce.moderate.parts import read_results
from lookonce.policy import Policy


@dataclass
class Summary:
    """Counts over all rows of a result."""

    policy: Policy
    rows: int = 0
    flagged: int = 0
    duplicates: int = 0
    asked: Counter[str] = field(default_factory=Counter)  # by rule
    fired: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)  # by kind


def summarise(out: Path) -> Summary:
    """Read a result. Blocking."""
    manifest, batches = read_results(out)
    summary = Summary(manifest.policy)
    rules = [rule.id for rule in manifest.policy.rules if "image" in rule.applies_to]
    for batch in batches:
        summary.rows += batch.num_rows
        summary.flagged += batch.column("flagged").to_pylist().count(True)
        summary.duplicates += batch.num_rows - batch.column("duplicate_of").null_count
        summary.errors.update(kind for kind in batch.column("error").to_pylist() if kind is not None)
        for rule in rules:
            summary.asked[rule] += batch.num_rows - batch.column(SCORE + rule).null_count
            summary.fired[rule] += batch.column(FIRED + rule).to_pylist().count(True)
    return summary


def print_summary(summary: Summary) -> None:
    """To stdout."""
    table = Table(box=None, pad_edge=False)
    for name, align in (("rule", "left"), ("severity", "left"), ("threshold", "right"), ("fired", "right"),
                        ("of", "right"), ("share", "right")):  # fmt: skip
        table.add_column(name, justify=align)  # type: ignore[arg-type]
    for rule in summary.policy.rules:
        if "image" not in rule.applies_to:
            continue
        fired, asked = summary.fired[rule.id], summary.asked[rule.id]
        share = f"{fired / asked:.1%}" if asked else "-"
        table.add_row(rule.id, rule.severity, f"{rule.threshold:g}", f"{fired:,}", f"{asked:,}", share)
    console = Console(highlight=False)
    console.print(table)
    errors = ", ".join(f"{kind} {count:,}" for kind, count in sorted(summary.errors.items())) or "none"
    console.print(
        f"{summary.rows:,} pictures, {summary.flagged:,} flagged, {summary.duplicates:,} duplicates; errors: {errors}"
    )
