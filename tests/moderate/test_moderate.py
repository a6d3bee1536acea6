"""`lookonce moderate` as its users run it: real services, real files, real kills."""

from __future__ import annotations

import json
import random
import signal
import sqlite3
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.moderate.conftest import COUNT, start_pair
from tests.moderate.scenes import area_under_curve, holds, policy_text

KILLS = 2


@pytest.fixture(scope="session")
def results(pair, pictures, policy, tmp_path_factory) -> Path:
    """Of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("results") / "results.parquet"
    done = pair.moderate(pictures.folder, policy, out, "--part-rows", "25")
    assert done.returncode == 0, done.stderr
    assert f"{COUNT} pictures" in done.stdout and "crowded" in done.stdout
    assert list(out.parent.iterdir()) == [out]  # nothing is left behind
    return out


def settled(path: Path) -> pa.Table:
    """A result without its timings."""
    return pq.read_table(path).drop(["timings"])


def begun(ledger: Path, rows: int) -> bool:
    """Whether the ledger is there and, if `rows` are wanted, has seen one."""
    if not ledger.exists():
        return False
    with closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)) as db:
        try:
            return rows == 0 or bool(
                db.execute("SELECT (SELECT count(*) FROM rows) + parts FROM progress").fetchone()[0]
            )
        except sqlite3.Error:  # being made
            return False


def name_of(row: dict) -> str:
    return "/".join(row["source"].split("/")[-2:])


def test_every_picture_is_there_once_with_true_scores(results, pictures):
    rows = pq.read_table(results).to_pylist()
    assert [row["index"] for row in rows] == list(range(COUNT))
    assert sorted(map(name_of, rows)) == sorted(pictures.truth)
    for rule in ("star", "circle", "cross", "red", "blue", "crowded"):
        scored = [(row[f"score_{rule}"], pictures.truth[name_of(row)]) for row in rows]
        positive = [score for score, shapes in scored if shapes is not None and holds(rule, shapes)]
        negative = [score for score, shapes in scored if shapes is not None and not holds(rule, shapes)]
        assert area_under_curve(positive, negative) >= 0.99, rule


def test_broken_files_are_rows_that_say_why(results, pictures):
    for row in pq.read_table(results).to_pylist():
        if pictures.truth[name_of(row)] is None:
            assert row["error"] == "image_invalid" and row["error_message"]
            assert row["score_star"] is None and row["flagged"] is None and row["width"] is None
        else:
            assert row["error"] is None and row["width"] > 0 and row["image_digest"].startswith("img_")


def test_copies_have_the_scores_of_the_first(results, pictures):
    rows = {name_of(row): row for row in pq.read_table(results).to_pylist()}
    first: dict[str, str] = {}
    for name, row in rows.items():  # in the order of the inputs
        original = first.setdefault(row["image_digest"], name)
        assert (row["duplicate_of"] is None) == (original == name)
        if original != name:
            assert row["duplicate_of"] == rows[original]["source"]
            assert row["duplicate_of_index"] == rows[original]["index"] < row["index"]
            assert [row[f"score_{rule}"] for rule in ("star", "red")] == [
                rows[original][f"score_{rule}"] for rule in ("star", "red")
            ]
    assert sum(row["duplicate_of"] is not None for row in rows.values()) == len(pictures.copies) > 3
    judged = Counter(row["image_digest"] for row in rows.values() if row["timings"]["encode_ms"] is not None)
    read = {row["image_digest"] for row in rows.values() if row["error"] is None}
    assert judged == dict.fromkeys(read, 1)  # whichever of the copies was read first


def test_follow_ups_are_asked_of_what_fires(results):
    rows = pq.read_table(results).to_pylist()
    assert {row["follow_up_cross"] is not None for row in rows if row["fired_cross"]} == {True}
    assert {row["follow_up_cross"] for row in rows if not row["fired_cross"]} == {None}
    assert any(row["fired_cross"] for row in rows)


def test_killed_and_taken_up_again_it_ends_the_same(pair, pictures, policy, results, tmp_path):
    out = tmp_path / "out.parquet"
    rng, kills = random.Random(5), 0
    while True:
        with pair.moderating(pictures.folder, policy, out, "--part-rows", "25") as run:
            run_folder = tmp_path / "out.parquet.run"
            deadline = time.monotonic() + 120
            while kills < KILLS and run.process.poll() is None and not begun(run_folder / "ledger.sqlite3", rows=kills):
                assert time.monotonic() < deadline, run.output
                time.sleep(0.02)
            if kills < KILLS:
                time.sleep(rng.uniform(0.1, 1.5))
                run.process.kill()
                kills += 1
                run.process.wait()
                continue
            assert run.wait_exit() == 0, run.output
            assert "going on after" in run.output or "finished already" in run.output
            break
    assert settled(out).equals(settled(results))


def test_interrupted_it_finishes_what_is_under_way(pair, pictures, policy, results, tmp_path):
    out = tmp_path / "out.parquet"
    options = ("--part-rows", "25", "--under-way", "4", "--progress-seconds", "0.2")
    with pair.moderating(pictures.folder, policy, out, *options) as run:
        run.wait_for(r"\d of 100 pictures")
        run.signal(signal.SIGINT)
        assert run.wait_exit() == 130, run.output
        assert "Run the same command again" in run.output
    done = pair.moderate(pictures.folder, policy, out, "--part-rows", "25")
    assert done.returncode == 0 and "going on after" in done.stderr
    assert settled(out).equals(settled(results))


def test_results_of_another_policy_or_source_are_never_mixed(pair, pictures, policy, results, tmp_path):
    before = results.read_bytes()
    other = tmp_path / "other.yaml"
    other.write_text(policy_text(threshold=0.9))
    done = pair.moderate(pictures.folder, other, results, "--part-rows", "25")
    assert done.returncode == 1 and "the policy was" in done.stderr and "--restart" in done.stderr
    done = pair.moderate(pictures.folder / "0", policy, results, "--part-rows", "25")
    assert done.returncode == 1 and f"now it is {pictures.folder / '0'}" in done.stderr
    done = pair.moderate(pictures.folder, policy, results, "--part-rows", "25")
    assert done.returncode == 0 and "finished already" in done.stderr
    assert results.read_bytes() == before


def test_json_lines_and_a_folder_of_parts_hold_the_same(pair, pictures, policy, results, tmp_path):
    source = pictures.folder / "1"
    for out, options in ((tmp_path / "r.jsonl", ()), (tmp_path / "parts", ("--part-rows", "10"))):
        done = pair.moderate(source, policy, out, *options)
        assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    parts = sorted((tmp_path / "parts").glob("part-*.parquet"))
    rows = [row for part in parts for row in pq.read_table(part).to_pylist()]
    assert len(parts) == 3 and [row["source"] for row in rows] == [line["source"] for line in lines]
    known = {row["source"]: row["score_star"] for row in pq.read_table(results).to_pylist()}
    for row, line in zip(rows, lines, strict=True):
        assert row["score_star"] == line["score_star"] == known[row["source"]]
    assert not (tmp_path / "parts" / "_run").exists() and (tmp_path / "parts" / "_manifest.json").exists()


def test_a_dry_run_estimates_and_writes_nothing(pair, pictures, policy, tmp_path):
    done = pair.moderate(pictures.folder, policy, tmp_path / "out.parquet", "--dry-run", "--sample", "12")
    assert done.returncode == 0, done.stderr
    assert "100 entries" in done.stdout and "estimate" in done.stdout and "12 pictures" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_services_that_restart_lose_nothing(pictures, policy, results, tmp_path):
    services = start_pair("memory://")
    with services.vision, services.language:
        out = tmp_path / "out.parquet"
        options = ("--part-rows", "25", "--under-way", "8", "--progress-seconds", "0.2")
        with services.moderating(pictures.folder, policy, out, *options) as run:
            run.wait_for(r"[1-9]\d* of 100 pictures")
            services.vision.kill()
            services.language.kill()
            services.language.restart()
            services.vision.restart()
            assert run.wait_exit() == 0, run.output
    assert settled(out).equals(settled(results))


@pytest.mark.slow
def test_a_service_that_stays_away_ends_the_run_for_now(pictures, policy, tmp_path):
    services = start_pair("memory://")
    with services.vision, services.language:
        out = tmp_path / "out.parquet"
        options = ("--under-way", "4", "--progress-seconds", "0.2", "--patience", "3s")
        with services.moderating(pictures.folder, policy, out, *options) as run:
            run.wait_for(r"[1-9]\d* of 100 pictures")
            services.language.kill()
            assert run.wait_exit() == 75, run.output
            assert "Run the same command again" in run.output
    assert (tmp_path / "out.parquet.run" / "ledger.sqlite3").exists()


def test_without_services_it_says_what_to_do(pictures, policy, tmp_path, monkeypatch):
    from tests.cli.commands import invoke

    given = ("moderate", pictures.folder, "--policy", policy, "--out", tmp_path / "o.parquet")
    done = invoke(*given, "--data-dir", tmp_path / "nothing")
    assert done.returncode == 1 and "start `lookonce up`" in done.stderr
    done = invoke(*given, "--vision", "localhost:1")
    assert done.returncode == 1 and "--vision and --lm go together" in done.stderr
    monkeypatch.setitem(sys.modules, "ray", None)  # as if not installed
    done = invoke(*given, "--vision", "localhost:1", "--lm", "localhost:1", "--ray", "auto")
    assert done.returncode == 1 and "pip install 'lookonce[ray]'" in done.stderr
    done = invoke("moderate", pictures.folder, "--out", tmp_path / "o.parquet")
    assert done.returncode == 2 and "--policy" in done.stderr
