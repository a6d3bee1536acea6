"""A killed run whose ledger or parts are damaged, or hold what is another's: made again, never shown."""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from lookonce.moderation.batch.results import Results
from tests.cli.commands import invoke
from tests.moderate.conftest import COUNT, settled
from tests.moderate.results import begin_results, write_results

KEYS = {"images": ("digest", "outcome"), "firsts": ("digest", "input"), "rows": ("number", "row")}
Spoil = Callable[[Path], None]


def change(run: Path, *statements: str) -> None:
    with closing(sqlite3.connect(run / "ledger.sqlite3")) as ledger, ledger:
        for statement in statements:
            assert ledger.execute(statement).rowcount > 0, statement


def swap(table: str, skip: int = 0, count: int = 2) -> Spoil:
    """Values under the next one's key: two, or so many (-1: all)."""
    key, value = KEYS[table]

    def work(run: Path) -> None:
        with closing(sqlite3.connect(run / "ledger.sqlite3")) as ledger, ledger:
            query = f"SELECT {key}, {value} FROM {table} ORDER BY {key} LIMIT ? OFFSET ?"
            keys, values = zip(*ledger.execute(query, (count, skip)), strict=True)
            moved = zip((*values[1:], values[0]), keys, strict=True)
            ledger.executemany(f"UPDATE {table} SET {value} = ? WHERE {key} = ?", moved)

    return work


def swap_files(run: Path) -> None:
    first, second = (run / "parts" / f"part-00000{n}.parquet" for n in (0, 1))
    for source, target in ((first, run / "aside"), (second, first), (run / "aside", second)):
        os.replace(source, target)


def cut_file(run: Path) -> None:
    part = run / "parts" / "part-000001.parquet"
    part.write_bytes(part.read_bytes()[:-200])


def foreign(run: Path) -> None:
    """The ledger of a run over another folder."""
    other = run.parent / "other"
    other.mkdir()
    shutil.copy(begin_results(other, 25, part_rows=10).with_name("results.parquet.run") / "ledger.sqlite3", run)


SPOILT: dict[str, Spoil] = {
    "outcomes under each other's digests": swap("images", count=-1),
    "first inputs under each other's digests": swap("firsts", count=-1),
    "rows under each other's numbers": swap("rows"),
    "a damaged row": lambda run: change(run, "UPDATE rows SET row = substr(row, 1, 40) WHERE number = 22"),
    "part files under each other's names": swap_files,
    "a part file that was cut": cut_file,
    "the digest of a part, damaged": lambda run: change(run, "UPDATE parts SET digest = zeroblob(64) WHERE number = 1"),
    "the ledger of another run": foreign,
    "outcomes of no form": lambda run: change(run, "UPDATE images SET outcome = 'text'"),
}


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_report_leaves_out_what_is_damaged(tmp_path, spoil):
    out = begin_results(tmp_path, 25, part_rows=10)
    known = {row["index"]: row for batch in Results.at(out).batches() for row in batch.to_pylist()}
    SPOILT[spoil](tmp_path / "results.parquet.run")
    spoilt = Results.at(out)
    rows = [row for batch in spoilt.batches() for row in batch.to_pylist()]
    assert all(row == known[row["index"]] for row in rows) and len({row["index"] for row in rows}) == len(rows)
    done = invoke("report", out)
    assert done.returncode == 0 and f"{len(rows)} images so far" in done.stdout, done.stderr
    assert len(rows) < 25 and f"{spoilt.left_out} damaged" in done.stderr


def test_a_damaged_result_is_told(tmp_path):
    out = write_results(tmp_path)
    data = bytearray(out.read_bytes())
    data[200] ^= 1  # within a page
    out.write_bytes(data)
    done = invoke("report", out)
    assert done.returncode == 1 and "--restart" in done.stderr and not (tmp_path / "results.html").exists()


@pytest.fixture(scope="module")
def killed(pair, images, policy, tmp_path_factory) -> Path:
    """What a run leaves that is killed when it has three parts of ten rows, and rows of a fourth."""
    out = tmp_path_factory.mktemp("killed") / "out.parquet"
    ledger = out.with_name("out.parquet.run") / "ledger.sqlite3"
    query = "SELECT (SELECT count(*) FROM parts) >= 3 AND (SELECT count(*) FROM rows) >= 3"
    with pair.moderating(images.folder, policy, out, "--part-rows", "10", "--under-way", "3") as run:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and run.process.poll() is None:
            if ledger.exists():
                with closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)) as db:
                    try:
                        if db.execute(query).fetchone()[0]:
                            break
                    except sqlite3.Error:  # being made
                        pass
            time.sleep(0.01)
        run.process.kill()
        run.process.wait()
    return ledger.parent


def test_what_is_damaged_is_made_again(pair, images, policy, results, killed, tmp_path):
    out = tmp_path / "out.parquet"
    run = shutil.copytree(killed, tmp_path / "out.parquet.run")
    for spoil in (swap("images"), swap("firsts", 2), swap("rows"), swap_files):
        spoil(run)
    done = pair.moderate(images.folder, policy, out, "--part-rows", "10")
    assert done.returncode == 0, done.stderr
    assert "damaged entries of an earlier process were dropped" in done.stderr
    assert f"{COUNT} of {COUNT} images" in done.stderr and list(tmp_path.glob("out.*")) == [out]
    assert settled(out).equals(settled(results))


def test_a_ledger_of_no_form_is_begun_again_with_restart(pair, images, policy, killed, tmp_path):
    out = tmp_path / "out.parquet"
    run = shutil.copytree(killed, tmp_path / "out.parquet.run")
    (run / "ledger.sqlite3").write_bytes(b"nothing" * 1000)
    given = (images.folder / "0", policy, out, "--part-rows", "10")
    done = pair.moderate(*given, "--restart")
    assert done.returncode == 0 and "results:" in done.stdout, done.stderr
