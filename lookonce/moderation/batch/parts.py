"""Where results lie: parts while the run goes on; at its end one file, or the folder of parts.

OUT.parquet     the finished result; while the run goes on OUT.parquet.run/ holds parts and ledger; OUT.jsonl, OUT.csv:
                likewise
OUT/            a folder: part-000000.parquet ..., _manifest.json; OUT/_run/ while the run goes on
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from blake3 import blake3

from lookonce.core.atomic_files import sync, write_durably
from lookonce.core.errors import ErrorKind, LookonceError, invalid
from lookonce.moderation.batch.ledger import Full
from lookonce.moderation.batch.output_formats import FORMS, METADATA_KEY, SUFFIXES, Columns
from lookonce.moderation.batch.run_identity import Manifest

_OF_A_FILE = re.compile(r"\.[A-Za-z][A-Za-z0-9]*")
"""A suffix that says what is in a file. (In "run-2026.11" it says nothing.)"""


class Output:
    """The paths of one result. Blocking."""

    def __init__(self, out: Path, form: str | None = None) -> None:
        """Raises INVALID_ARGUMENT when `form` and the file's suffix disagree."""
        self.out = out.expanduser().absolute()
        by_suffix = SUFFIXES.get(self.out.suffix.lower())
        self.single = by_suffix is not None and not self.out.is_dir()
        if self.single and form not in (None, by_suffix):
            raise invalid(f"--out {out} says {by_suffix}, --format says {form}", param="format")
        self.form = (by_suffix if self.single else form) or "parquet"
        self.run = self.out.with_name(self.out.name + ".run") if self.single else self.out / "_run"
        self.parts = self.run / "parts" if self.single else self.out
        self.ledger = self.run / "ledger.sqlite3"
        self._lock: int | None = None

    @classmethod
    def chosen(cls, out: Path, form: str | None) -> Output:
        """For a run. Raises INVALID_ARGUMENT, too, for the name of a file of a form that can't be written."""
        output = cls(out, form)
        suffix = output.out.suffix
        if not output.single and form is None and _OF_A_FILE.fullmatch(suffix) and not output.out.is_dir():
            text = (
                f"--out {out}: {suffix} can't be written. Choose a file that ends in {', '.join(SUFFIXES)}, "
                "or a folder; for a folder of this name, give --format too"
            )
            raise invalid(text, param="out")
        return output

    def claim(self) -> None:
        """Make the directories, and keep every other process out. Raises INVALID_ARGUMENT or CONFLICT."""
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.run.mkdir(parents=True, exist_ok=True)
            self.parts.mkdir(exist_ok=True)
            self._lock = os.open(self.run / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise invalid(f"--out {self.out}: cannot be written ({error.strerror})", param="out") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.release()
            text = f"another `lookonce moderate` is writing {self.out}: wait for it, or choose another --out"
            raise LookonceError(ErrorKind.CONFLICT, text, param="out") from None

    def release(self) -> None:
        """Let others in."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def part(self, number: int) -> Path:
        return self.parts / f"part-{number:06}.{self.form}"

    def written(self) -> list[Path]:
        return sorted(self.parts.glob(f"part-*.{self.form}"))

    def manifest(self) -> Manifest | None:
        """Of the run that is under way or finished here. Raises CONFLICT when it can't be read."""
        for path in (self.run / "manifest.json", self._final_manifest):
            if path.is_file():
                return _manifest(path.read_bytes(), path)
        if self.single and self.form == "parquet" and self.out.is_file():
            try:
                found = (pq.read_schema(self.out).metadata or {}).get(METADATA_KEY)
            except (pa.ArrowInvalid, OSError):
                found = None
            if found is not None:
                return _manifest(found, self.out)
        return None

    def begin(self, manifest: Manifest) -> None:
        """Note which run this is."""
        data = orjson.dumps(manifest.to_json(), option=orjson.OPT_INDENT_2)
        write_durably(self.run / "manifest.json", lambda path: path.write_bytes(data))

    def finished(self) -> bool:
        """Whether a result is complete here, with no run under way."""
        return not (self.run / "manifest.json").exists() and (
            self.out.is_file() if self.single else self._final_manifest.is_file()
        )

    def occupied(self) -> bool:
        """Whether something lies here that no run of ours left."""
        if self.manifest() is not None:
            return False
        return self.out.is_file() if self.single else self.out.is_dir() and any(self.out.glob("part-*"))

    def drop_parts(self) -> None:
        """Forget what was written, to begin again."""
        for path in self.parts.glob("part-*"):
            path.unlink()
        self._final_manifest.unlink(missing_ok=True)

    def write_part(self, number: int, columns: Columns, rows: Sequence[Full]) -> None:
        """Make a part durable."""
        write_durably(self.part(number), lambda path: FORMS[self.form].write(path, columns, rows))

    def digest(self, number: int) -> bytes:
        """Of a part's file. Raises OSError."""
        return blake3().update_mmap(self.part(number)).digest()

    def images(self, number: int, columns: Columns) -> Iterator[str]:
        """The ids of the images in a part."""
        for batch in FORMS[self.form].read(self.part(number), columns.schema):
            yield from batch.column("image_digest").drop_null().to_pylist()

    def finish(self, count: int, columns: Columns) -> None:
        """From parts to the result, and nothing else left behind."""
        if self.single:
            files = [self.part(number) for number in range(count)]
            write_durably(self.out, lambda path: FORMS[self.form].join(path, columns, files))
        else:
            for path in set(self.written()) - {self.part(number) for number in range(count)}:
                path.unlink()
        if not self.single or self.form != "parquet":  # which holds its manifest
            data = (self.run / "manifest.json").read_bytes()
            write_durably(self._final_manifest, lambda path: path.write_bytes(data))
        (self.run / "manifest.json").unlink()  # from here on it is finished
        sync(self.run)
        shutil.rmtree(self.run, ignore_errors=True)

    @property
    def _final_manifest(self) -> Path:
        return self.out.with_name(self.out.name + ".manifest.json") if self.single else self.out / "_manifest.json"


def _manifest(data: bytes, path: Path) -> Manifest:
    try:
        return Manifest.from_json(orjson.loads(data))
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        text = f"{path} is not a manifest of this version of lookonce: use another --out"
        raise LookonceError(ErrorKind.CONFLICT, text, param="out") from error
