"""The columns of a result, and how rows become a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson
import pyarrow as pa

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
        self._rules = [rule for rule in manifest.policy.rules if "image" in rule.applies_to]
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
