"""The columns of a result, and the forms it is written in: Parquet, JSON lines, CSV.

Each form writes a part, joins parts, reads both back.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.parquet as pq

from lookonce.core.identity import image_id
from lookonce.moderation.batch.ledger import Full
from lookonce.moderation.batch.outcome import Outcome
from lookonce.moderation.batch.run_identity import Manifest
from lookonce.moderation.judging import judge

METADATA_KEY = b"lookonce"
SCORE, FIRED, FOLLOW_UP = "score_", "fired_", "follow_up_"
"""Prefixes of the columns of a rule, before its id."""
_TIMINGS = ("read_ms", "encode_ms", "score_ms", "follow_up_ms")


class Columns:
    """Turns rows into tables. All but `timings` depends on inputs, policy and models alone."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._rules = manifest.policy.of("image")
        fields: list[tuple[str, pa.DataType]] = [
            ("index", pa.int64()),
            ("source", pa.string()),
            ("image_digest", pa.string()),
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("flagged", pa.bool_()),
            ("severity", pa.string()),
        ]
        for rule in self._rules:
            fields += [(SCORE + rule.id, pa.float64()), (FIRED + rule.id, pa.bool_())]
            if rule.follow_up:
                fields.append((FOLLOW_UP + rule.id, pa.string()))
        fields += [("error", pa.string()), ("error_message", pa.string())]
        fields += [("duplicate_of", pa.string()), ("duplicate_of_index", pa.int64())]
        fields += [(name, pa.string()) for name in ("vision_fingerprint", "language_fingerprint", "policy_digest")]
        timings = pa.struct([*((name, pa.float64()) for name in _TIMINGS), ("embedding", pa.string())])
        fields.append(("timings", timings))
        self.schema = pa.schema(fields, metadata={METADATA_KEY: orjson.dumps(manifest.to_json())})

    def table(self, rows: Sequence[Full]) -> pa.Table:
        """One row each, in their order."""
        return pa.Table.from_pylist([self.record(full) for full in rows], schema=self.schema)

    def record(self, full: Full) -> dict[str, Any]:
        """A row as plain values, in the order of the columns."""
        row, outcome, first, first_source = full
        known = outcome or Outcome()
        failure = row.failure or known.failure
        verdict = judge(self._rules, known.scores)
        values: dict[str, Any] = {
            "index": row.index,
            "source": row.source,
            "image_digest": image_id(row.digest) if row.digest is not None else None,
            "width": known.width,
            "height": known.height,
            "flagged": verdict.flagged if failure is None else None,
            "severity": verdict.severity,
        }
        for rule in self._rules:
            values[SCORE + rule.id] = known.scores.get(rule.id)
            values[FIRED + rule.id] = verdict.labels.get(rule.id)
            if rule.follow_up:
                values[FOLLOW_UP + rule.id] = known.follow_ups.get(rule.id)
        identity = self._manifest.identity
        return values | {
            "error": failure.kind if failure else None,
            "error_message": failure.message if failure else None,
            "duplicate_of": first_source,
            "duplicate_of_index": first,
            "vision_fingerprint": identity.models.vision,
            "language_fingerprint": identity.models.language,
            "policy_digest": identity.policy_digest,
            "timings": vars(row.timings),
        }


BATCH_ROWS = 4096
GROUP_ROWS = 65536
_BLOCK_BYTES = 8 << 20  # read at once; the longest row of a CSV must fit into it
_FORMULA = r"'*(?:\s*[=+\-@＝＋－＠]|[\t\r\n])"
"""How a cell begins that a spreadsheet may take for a formula; behind quotes, so that escaping can be undone."""


class Form(Protocol):
    """One way to write rows. Blocking."""

    def write(self, path: Path, columns: Columns, rows: Sequence[Full]) -> None:
        """One part."""

    def join(self, path: Path, columns: Columns, parts: Sequence[Path]) -> None:
        """One file of all parts, in their order."""

    def read(self, path: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """The rows of a part or of a whole result."""


class Parquet:
    """Typed columns, compressed, each page with a checksum; the schema holds the manifest."""

    def write(self, path: Path, columns: Columns, rows: Sequence[Full]) -> None:
        pq.write_table(columns.table(rows), path, compression="zstd", write_page_checksum=True)

    def join(self, path: Path, columns: Columns, parts: Sequence[Path]) -> None:
        with pq.ParquetWriter(path, columns.schema, compression="zstd", write_page_checksum=True) as writer:
            waiting: list[pa.Table] = []
            for part in parts:
                waiting.append(pq.read_table(part, page_checksum_verification=True))
                if sum(table.num_rows for table in waiting) >= GROUP_ROWS:
                    writer.write_table(pa.concat_tables(waiting))
                    waiting = []
            if waiting:
                writer.write_table(pa.concat_tables(waiting))

    def read(self, path: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield from file.iter_batches(batch_size=BATCH_ROWS)


class JsonLines:
    """An object a line."""

    def write(self, path: Path, columns: Columns, rows: Sequence[Full]) -> None:
        with path.open("wb") as file:
            for row in rows:
                file.write(orjson.dumps(columns.record(row), option=orjson.OPT_APPEND_NEWLINE))

    def join(self, path: Path, columns: Columns, parts: Sequence[Path]) -> None:
        with path.open("wb") as target:
            for part in parts:
                with part.open("rb") as source:
                    shutil.copyfileobj(source, target)

    def read(self, path: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        with path.open("rb") as stream:
            while rows := [orjson.loads(line) for line in islice(stream, BATCH_ROWS)]:
                yield pa.RecordBatch.from_pylist(rows, schema=schema)


class Csv:
    """RFC 4180 in UTF-8, with a header; nothing in a cell: no value. Structs become a column for each of their fields.

    Text that a spreadsheet would take for a formula has a ' before it (OWASP, CSV injection): names of files and
    answers of models are strangers' words. `read` takes it off again.
    """

    def write(self, path: Path, columns: Columns, rows: Sequence[Full]) -> None:
        pcsv.write_csv(_flat(columns.table(rows)), path)

    def join(self, path: Path, columns: Columns, parts: Sequence[Path]) -> None:
        self.write(path, columns, [])
        header = path.stat().st_size
        with path.open("ab") as target:
            for part in parts:
                with part.open("rb") as source:
                    source.seek(header)
                    shutil.copyfileobj(source, target)

    def read(self, path: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """In batches, the columns as they were."""
        flat = _flat(schema.empty_table()).schema
        opened = pcsv.open_csv(
            path,
            pcsv.ReadOptions(block_size=_BLOCK_BYTES),
            pcsv.ParseOptions(newlines_in_values=True),
            pcsv.ConvertOptions(
                column_types=flat, null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=False
            ),
        )
        with opened as reader:
            for batch in reader:
                yield _nested(batch, schema)


def _flat(table: pa.Table) -> pa.Table:
    """`timings: {read_ms, ...}` as `timings_read_ms` and so on; formulas as text."""
    flat = table.flatten()  # names their columns timings.read_ms
    texts = [pc.replace_substring_regex(a, f"^({_FORMULA})", r"'\1") if _text(a) else a for a in flat.columns]
    return pa.table(texts, names=[name.replace(".", "_") for name in flat.column_names])


def _nested(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """`_flat`, undone."""
    columns = iter(pc.replace_substring_regex(a, f"^'({_FORMULA})", r"\1") if _text(a) else a for a in batch.columns)
    arrays = []
    for field in schema:
        if pa.types.is_struct(field.type):
            inner = [next(columns) for _ in field.type]
            arrays.append(pa.StructArray.from_arrays(inner, fields=list(field.type)))
        else:
            arrays.append(next(columns))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _text(column: pa.ChunkedArray | pa.Array) -> bool:
    return bool(pa.types.is_string(column.type))


FORMS: dict[str, Form] = {"parquet": Parquet(), "jsonl": JsonLines(), "csv": Csv()}
SUFFIXES = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv"}
