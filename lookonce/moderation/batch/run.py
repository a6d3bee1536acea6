"""One run on disk: begun, taken up again, its parts written in order, finished. Ledger and files keep to one thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TypeVar

from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.identity import digest_of_image_id
from lookonce.moderation.batch.ledger import Ledger
from lookonce.moderation.batch.outcome import Outcome, Row
from lookonce.moderation.batch.output_formats import Columns
from lookonce.moderation.batch.parts import Output
from lookonce.moderation.batch.results import Results
from lookonce.moderation.batch.run_identity import Manifest
from lookonce.moderation.judging import judge

T = TypeVar("T")


def prepare(output: Output, manifest: Manifest, *, restart: bool) -> bool:
    """Claim the output for this run; whether it is finished already. Raises CONFLICT when the results there are those
    of another run, naming what differs. Blocking."""
    begun = output.manifest()
    if begun is None and output.occupied() and not restart:
        text = f"{output.out} exists and is not a result of `lookonce moderate`: choose another --out, or --restart"
        raise LookonceError(ErrorKind.CONFLICT, text, param="out")
    differences = begun.identity.differences(manifest.identity) if begun is not None else []
    if differences and not restart:
        text = (
            f"{output.out} holds results of another run, and results are never mixed: {'; '.join(differences)}. "
            "Choose another --out, or begin again with --restart"
        )
        raise LookonceError(ErrorKind.CONFLICT, text, param="out")
    if begun is not None and output.finished() and not restart:
        return True
    output.claim()
    if restart or begun is None:
        if output.ledger.exists():
            _start_again(output.ledger, begun, manifest)
        output.drop_parts()
    output.begin(manifest)
    return False


def _start_again(path: Path, begun: Manifest | None, manifest: Manifest) -> None:
    try:
        with closing(Ledger(path, manifest.identity)) as ledger:
            same = begun is not None and begun.identity.same_judgement(manifest.identity)
            ledger.start_again(keep_images=same)
    except LookonceError:  # damaged, or of another version: nothing of it is kept
        for file in path.parent.glob(f"{path.name}*"):
            file.unlink()


class Run:
    """A claimed output. Close it at the end."""

    def __init__(self, output: Output, manifest: Manifest) -> None:
        """Blocking."""
        self.output = output
        self.manifest = manifest
        self.columns = Columns(manifest)
        self._size = manifest.identity.part_rows
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        self._ledger = Ledger(output.ledger, manifest.identity)
        self.dropped = self._ledger.mend(self._intact, self._images)
        """Entries that earlier processes left and that were damaged or another's."""
        self._parts = len(self._ledger.parts())
        self._total: int | None = None  # inputs, once the source has been read to its end
        start = self._parts * self._size
        self._rows = {number for number in self._ledger.row_numbers() if number >= start}  # of parts not written
        self._listed = 0
        self._advanced = asyncio.Event()
        self.begun = Results.at(output.out).counts()
        """Of the rows that earlier processes left."""

    def has(self, index: int) -> bool:
        """Whether the input's row is known."""
        return index < self._parts * self._size or index in self._rows

    def fired(self, outcome: Outcome | None) -> bool:
        return outcome is not None and judge(self.manifest.policy.rules, outcome.scores).flagged

    def listed(self, count: int) -> None:
        """So many inputs are known to be there."""
        self._listed = max(self._listed, count)

    async def listing_ended(self) -> None:
        """There are no more inputs than `listed`."""
        self._total = self._listed
        await self.record([], {})  # the last part is shorter than the others

    async def wait_near(self, index: int, parts: int) -> None:
        """Until the input is at most so many parts beyond the first that is not complete."""
        while index >= (self._parts + parts) * self._size:
            self._advanced.clear()
            await self._advanced.wait()

    async def outcome(self, digest: bytes, index: int) -> tuple[Outcome, bool] | None:
        """What is known of an image, and whether there is a row of it besides the one at `index`."""
        return await self._in_thread(lambda: self._ledger.outcome(digest, index))

    async def record(self, rows: Sequence[Row], outcomes: dict[bytes, Outcome]) -> None:
        """Keep rows, with the outcomes that are new, and write the parts that are now complete."""
        await self._in_thread(lambda: self._record(rows, outcomes))
        self._advanced.set()

    async def complete(self) -> bool:
        """Whether every input is in a part."""
        return self._total is not None and self._parts * self._size >= self._total

    async def finish(self) -> None:
        """Make the result of the parts. Raises CONFLICT when a part is damaged."""
        await self._in_thread(self._finish)

    def close(self) -> None:
        self._thread.shutdown()
        self._ledger.close()
        self.output.release()

    def _finish(self) -> None:
        for number, digest in self._ledger.parts().items():
            if digest is None or not self._intact(number, digest):
                raise self._damaged()
        self.output.finish(self._parts, self.columns)

    def _intact(self, number: int, digest: bytes) -> bool:
        try:
            return self.output.digest(number) == digest
        except OSError:
            return False

    def _images(self, number: int) -> Iterator[bytes]:
        return map(digest_of_image_id, self.output.images(number, self.columns))

    def _damaged(self) -> LookonceError:
        text = f"{self.output.run} was damaged meanwhile: run the same command again, which makes again what is missing"
        return LookonceError(ErrorKind.CONFLICT, text, param="out")

    def _record(self, rows: Sequence[Row], outcomes: dict[bytes, Outcome]) -> None:
        if rows:
            self._ledger.record(rows, outcomes)
            self._rows.update(row.index for row in rows)
        while (end := self._end_of_next()) is not None:
            start = self._parts * self._size
            if not all(number in self._rows for number in range(start, end)):
                return
            full = [row for row in self._ledger.rows(start, end) if row is not None]
            if len(full) < end - start:
                raise self._damaged()
            self.output.write_part(self._parts, self.columns, full)
            self._ledger.part_written(self._parts, end, self.output.digest(self._parts))
            self._rows.difference_update(range(start, end))
            self._parts += 1

    def _end_of_next(self) -> int | None:
        """Where the next part ends; None when there is none, or its end isn't known yet."""
        start, end = self._parts * self._size, (self._parts + 1) * self._size
        if self._total is not None:
            end = min(end, self._total)
        elif end > self._listed:
            return None
        return end if end > start else None

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
