"""What came of one image: everything that depends on its bytes, the policy and the models, and on nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import orjson

from lookonce.core.errors import ErrorKind, LookonceError

SERVICE_CRASHED = "service_crashed"
"""The kind of an image that kills a service whenever it is asked about. No service can say so: no ErrorKind."""


@dataclass(frozen=True)
class Failure:
    """Why there are no scores: a kind of `lookonce.core.errors.ErrorKind`, or SERVICE_CRASHED, and our words."""

    kind: str
    message: str

    @classmethod
    def of(cls, error: LookonceError) -> Failure:
        """The failure that an error means. Raises the error itself where it is no image's doing: a bucket that does
        not accept the credentials (any more) ends the run, which goes on with better ones."""
        if error.kind is ErrorKind.UNAUTHENTICATED:
            raise error
        return cls(error.kind.value, error.message)


@dataclass(frozen=True)
class Outcome:
    """Scores by rule id, for the rules that were asked. Without `failure` the size is known."""

    width: int | None = None  # pixels, after EXIF orientation
    height: int | None = None
    scores: dict[str, float] = field(default_factory=dict)
    follow_ups: dict[str, str] = field(default_factory=dict)
    failure: Failure | None = None

    def to_json(self) -> bytes:
        return orjson.dumps(self)

    @classmethod
    def from_json(cls, data: bytes | str) -> Outcome:
        fields: dict[str, Any] = orjson.loads(data)
        failure = fields.pop("failure")
        return cls(**fields, failure=Failure(**failure) if failure else None)


@dataclass(frozen=True)
class Timings:
    """Milliseconds, as this job saw them; `embedding` is "hit", "miss" or "coalesced"."""

    read_ms: float | None = None
    encode_ms: float | None = None
    score_ms: float | None = None
    follow_up_ms: float | None = None
    embedding: str | None = None

    def to_json(self) -> bytes:
        return orjson.dumps({name: value for name, value in vars(self).items() if value is not None})


@dataclass(frozen=True)
class Row:
    """One input of the job. With `failure` its bytes could not be had; else `digest` leads to its outcome."""

    index: int
    source: str
    digest: bytes | None = None  # 32 bytes, BLAKE3
    failure: Failure | None = None
    timings: Timings = Timings()

    def to_json(self) -> bytes:
        """All but the index."""
        digest = self.digest.hex() if self.digest is not None else None
        return orjson.dumps([text(self.source), digest, self.failure, orjson.Fragment(self.timings.to_json())])

    @classmethod
    def from_json(cls, index: int, data: bytes | str) -> Row:
        source, digest, failure, timings = orjson.loads(data)
        known = bytes.fromhex(digest) if digest is not None else None
        return cls(index, source, known, Failure(**failure) if failure else None, Timings(**timings))


def text(name: str) -> str:
    """SQLite and Parquet take no lone surrogates, which stand for bytes of file names that are not UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
