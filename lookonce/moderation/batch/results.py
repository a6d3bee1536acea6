"""What lies at --out, read back: a finished result, or all that is known of a run under way, and counts of either."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import pyarrow as pa
import structlog

from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.moderation.batch.ledger import Ledger
from lookonce.moderation.batch.output_formats import BATCH_ROWS, FIRED, FORMS, SCORE, Columns
from lookonce.moderation.batch.parts import Output
from lookonce.moderation.batch.run_identity import Manifest

log = structlog.get_logger(__name__)


@dataclass
class Results:
    """Rows of one run. Blocking."""

    output: Output
    manifest: Manifest
    finished: bool
    left_out: int = 0
    """Rows and parts that the last `batches` left out: damaged, or not of this run."""

    @classmethod
    def at(cls, out: Path) -> Results:
        """Raises NOT_FOUND where no run has been begun, CONFLICT when what lies there can't be read."""
        output = Output(out)
        manifest = output.manifest()
        if manifest is None:
            raise LookonceError(ErrorKind.NOT_FOUND, f"{out} holds no results of `lookonce moderate`", param="results")
        if not output.single:
            output = Output(out, manifest.identity.form)
        return cls(output, manifest, output.finished())

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows in batches, in order; of a run under way those in parts, then those in its ledger. Raises CONFLICT
        when the run ends meanwhile."""
        schema, read = Columns(self.manifest).schema, FORMS[self.manifest.identity.form].read
        self.left_out = 0
        try:
            if self.finished:
                for path in [self.output.out] if self.output.single else self.output.written():
                    yield from read(path, schema)
            elif self.output.ledger.exists():
                yield from self._under_way()
        except FileNotFoundError:
            over = self.output.finished()
            why = "the run has ended meanwhile: look again" if over else "a part is missing: run it again"
            raise LookonceError(ErrorKind.CONFLICT, f"{self.output.out}: {why}", param="results") from None
        except (OSError, ValueError) as error:
            log.warning("results can't be read", out=str(self.output.out), error=str(error))
            text = f"{self.output.out} is damaged: make it again with --restart"
            raise LookonceError(ErrorKind.CONFLICT, text, param="results") from error

    def _under_way(self) -> Iterator[pa.RecordBatch]:
        columns, read = Columns(self.manifest), FORMS[self.manifest.identity.form].read
        with closing(Ledger(self.output.ledger, self.manifest.identity, read_only=True)) as ledger:
            parts = ledger.parts()
            for number, digest in parts.items():
                if digest == self.output.digest(number):
                    yield from read(self.output.part(number), columns.schema)
                else:
                    self.left_out += 1
            rows = ledger.rows(len(parts) * self.manifest.identity.part_rows)
            while some := list(islice(rows, BATCH_ROWS)):
                good = [row for row in some if row is not None]
                self.left_out += len(some) - len(good)
                yield from columns.table(good).to_batches()

    def counts(self) -> Counts:
        """Of all rows."""
        counts = Counts()
        rules = [rule.id for rule in self.manifest.policy.of("image")]
        for batch in self.batches():
            counts.add(batch, rules)
        return counts


@dataclass
class Counts:
    """Of rows."""

    rows: int = 0
    flagged: int = 0
    duplicates: int = 0
    asked: Counter[str] = field(default_factory=Counter)  # by rule
    fired: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)  # by kind

    def add(self, batch: pa.RecordBatch, rules: list[str]) -> None:
        """Count the rows of a batch."""
        self.rows += batch.num_rows
        self.flagged += batch.column("flagged").true_count
        self.duplicates += batch.num_rows - batch.column("duplicate_of").null_count
        self.errors.update(kind for kind in batch.column("error").to_pylist() if kind is not None)
        for rule in rules:
            self.asked[rule] += batch.num_rows - batch.column(SCORE + rule).null_count
            self.fired[rule] += batch.column(FIRED + rule).true_count
