"""`lookonce moderate` as its users run it: real services, real files, real kills."""

from __future__ import annotations

import csv
import json
import random
import re
import signal
import sqlite3
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.cli.commands import invoke
from tests.moderate.conftest import COUNT, settled, start_pair
from tests.moderate.scenes import area_under_curve, holds, policy_text

KILLS = 2


def begun(ledger: Path, rows: int) -> bool:
    """Whether the ledger is there and, if `rows` are wanted, has seen one."""
    if not ledger.exists():
        return False
    with closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)) as db:
        try:
            return rows == 0 or bool(
                db.execute("SELECT (SELECT count(*) FROM rows) + (SELECT count(*) FROM parts)").fetchone()[0]
            )
        except sqlite3.Error:  # being made
            return False


def name_of(row: dict) -> str:
    return "/".join(row["source"].split("/")[-2:])


def test_every_image_is_there_once_with_true_scores(results, images):
    rows = pq.read_table(results).to_pylist()
    assert [row["index"] for row in rows] == list(range(COUNT))
    assert sorted(map(name_of, rows)) == sorted(images.truth)
    for rule in ("star", "circle", "cross", "red", "blue", "crowded"):
        scored = [(row[f"score_{rule}"], images.truth[name_of(row)]) for row in rows]
        positive = [score for score, shapes in scored if shapes is not None and holds(rule, shapes)]
        negative = [score for score, shapes in scored if shapes is not None and not holds(rule, shapes)]
        assert area_under_curve(positive, negative) >= 0.99, rule


def test_broken_files_are_rows_that_say_why(results, images):
    for row in pq.read_table(results).to_pylist():
        if images.truth[name_of(row)] is None:
            assert row["error"] == "image_invalid" and row["error_message"]
            assert row["score_star"] is None and row["flagged"] is None and row["width"] is None
        else:
            assert row["error"] is None and row["width"] > 0 and row["image_digest"].startswith("img_")


def test_copies_have_the_scores_of_the_first(results, images):
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
    assert sum(row["duplicate_of"] is not None for row in rows.values()) == len(images.copies) > 3
    judged = Counter(row["image_digest"] for row in rows.values() if row["timings"]["encode_ms"] is not None)
    read = {row["image_digest"] for row in rows.values() if row["error"] is None}
    assert judged == dict.fromkeys(read, 1)  # whichever of the copies was read first


def test_follow_ups_are_asked_of_what_fires(results):
    rows = pq.read_table(results).to_pylist()
    assert {row["follow_up_cross"] is not None for row in rows if row["fired_cross"]} == {True}
    assert {row["follow_up_cross"] for row in rows if not row["fired_cross"]} == {None}
    assert any(row["fired_cross"] for row in rows)


def test_killed_and_taken_up_again_it_ends_the_same(pair, images, policy, results, tmp_path):
    out = tmp_path / "out.parquet"
    rng, kills = random.Random(5), 0
    while True:
        with pair.moderating(images.folder, policy, out, "--part-rows", "25") as run:
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


def test_interrupted_it_finishes_what_is_under_way_and_goes_on_counting(pair, images, policy, results, tmp_path):
    out = tmp_path / "out.csv"
    options = ("--under-way", "4", "--progress-seconds", "0.2")
    with pair.moderating(images.folder, policy, out, *options) as run:
        run.wait_for(r"[1-9]\d of 100 images")
        run.signal(signal.SIGINT)
        assert run.wait_exit() == 130, run.output
        assert "Run the same command again" in run.output
        (known,) = re.findall(r"stopped: (\d+) of 100", run.output)
    assert f"{known} images so far" in invoke("report", out, "--gallery", "0").stdout
    done = pair.moderate(images.folder, policy, out)
    assert done.returncode == 0 and f"going on after {known} images" in done.stderr
    told = re.findall(r"100 of 100 images, .* ([\d.]+)% flagged, (\d+) errors, (\d+) duplicates", done.stderr)[-1]
    rows = settled(out).to_pylist()
    errors, flagged = (sum(bool(row[name]) for row in rows) for name in ("error", "flagged"))
    duplicates = sum(row["duplicate_of"] is not None for row in rows)
    assert told == (f"{100 * flagged / (COUNT - errors):.1f}", str(errors), str(duplicates))
    assert f"{COUNT} images, {flagged} flagged, {duplicates} duplicates" in done.stdout
    assert settled(out).equals(settled(results))


def test_results_of_another_policy_or_source_are_never_mixed(pair, images, policy, results, tmp_path):
    before = results.read_bytes()
    other = tmp_path / "other.yaml"
    other.write_text(policy_text(threshold=0.9))
    done = pair.moderate(images.folder, other, results, "--part-rows", "25")
    assert done.returncode == 1 and "the policy was" in done.stderr and "--restart" in done.stderr
    done = pair.moderate(images.folder / "0", policy, results, "--part-rows", "25")
    assert done.returncode == 1 and f"now it is {images.folder / '0'}" in done.stderr
    done = pair.moderate(images.folder, policy, results, "--part-rows", "25")
    assert done.returncode == 0 and "finished already" in done.stderr
    assert results.read_bytes() == before


def test_json_lines_csv_and_a_folder_of_parts_hold_the_same(pair, images, policy, results, tmp_path):
    source = images.folder / "1"
    for out, options in (("r.jsonl", ()), ("r.csv", ("--part-rows", "10")), ("parts", ("--part-rows", "10"))):
        done = pair.moderate(source, policy, tmp_path / out, *options)
        assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    with (tmp_path / "r.csv").open(newline="") as file:
        cells = list(csv.DictReader(file))
    parts = sorted((tmp_path / "parts").glob("part-*.parquet"))
    rows = [row for part in parts for row in pq.read_table(part).to_pylist()]
    assert len(parts) == 3 and len(cells) == len(lines) == len(rows)
    known = {row["source"]: row["score_star"] for row in pq.read_table(results).to_pylist()}
    for row, line, cell in zip(rows, lines, cells, strict=True):
        assert row["source"] == line["source"] == cell["source"]
        assert row["score_star"] == line["score_star"] == known[row["source"]]
        assert cell["score_star"] == ("" if row["score_star"] is None else str(row["score_star"]))
        assert cell["flagged"] == {True: "true", False: "false", None: ""}[row["flagged"]]
        assert (cell["timings_embedding"] == "") == (row["timings"]["embedding"] is None)
    assert not (tmp_path / "parts" / "_run").exists() and (tmp_path / "parts" / "_manifest.json").exists()


def test_no_cell_of_a_csv_is_a_formula(pair, images, policy, tmp_path):
    formulas = ['=HYPERLINK("http://evil/","x")', "+1", "-1+2", "@SUM(A1)", "\t=1", "\r\n=1", " =1", "'=1", "＝1"]
    names = [*formulas, "'plain", "a,b;\n", '"', "NA"]
    image = images.folder / next(name for name, shapes in sorted(images.truth.items()) if shapes)
    with (tmp_path / "list.jsonl").open("w") as file:
        file.writelines(json.dumps({"image": str(image), "id": name}) + "\n" for name in names)
    given = (tmp_path / "list.jsonl", policy, tmp_path / "r.csv", "--column", "image", "--id-column", "id")
    done = pair.moderate(*given, "--part-rows", "4")
    assert done.returncode == 0, done.stderr
    with (tmp_path / "r.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["source"] for row in rows] == ["'" + name for name in formulas] + names[len(formulas) :]
    assert {row["duplicate_of"] for row in rows[1:]} == {"'" + names[0]}
    assert settled(tmp_path / "r.csv").column("source").to_pylist() == names


def test_what_cannot_be_written_is_refused_with_what_can(pair, images, policy, tmp_path):
    for name in ("e.xlsx", "e.csv.gz", "e.tsv"):
        done = pair.moderate(images.folder, policy, tmp_path / name)
        assert (
            done.returncode == 1 and ".csv" in done.stderr and ".parquet" in done.stderr and "--format" in done.stderr
        )
    assert not list(tmp_path.iterdir())


def test_a_dry_run_estimates_and_writes_nothing(pair, images, policy, tmp_path):
    done = pair.moderate(images.folder, policy, tmp_path / "out.parquet", "--dry-run", "--sample", "12")
    assert done.returncode == 0, done.stderr
    assert "100 entries" in done.stdout and "estimate" in done.stdout and "12 images" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_services_that_restart_lose_nothing(images, policy, results, tmp_path):
    services = start_pair("memory://")
    with services.vision, services.language:
        out = tmp_path / "out.parquet"
        options = ("--part-rows", "25", "--under-way", "8", "--progress-seconds", "0.2")
        with services.moderating(images.folder, policy, out, *options) as run:
            run.wait_for(r"[1-9]\d* of 100 images")
            services.vision.kill()
            services.language.kill()
            services.language.restart()
            services.vision.restart()
            assert run.wait_exit() == 0, run.output
    assert settled(out).equals(settled(results))


@pytest.mark.slow
def test_a_service_that_stays_away_ends_the_run_for_now(images, policy, tmp_path):
    services = start_pair("memory://")
    with services.vision, services.language:
        out = tmp_path / "out.parquet"
        options = ("--under-way", "4", "--progress-seconds", "0.2", "--patience", "3s")
        with services.moderating(images.folder, policy, out, *options) as run:
            run.wait_for(r"[1-9]\d* of 100 images")
            services.language.kill()
            assert run.wait_exit() == 75, run.output
            assert "Run the same command again" in run.output
    assert (tmp_path / "out.parquet.run" / "ledger.sqlite3").exists()


def test_without_services_it_says_what_to_do(images, policy, tmp_path, monkeypatch):
    given = ("moderate", images.folder, "--policy", policy, "--out", tmp_path / "o.parquet")
    done = invoke(*given, "--data-dir", tmp_path / "nothing")
    assert done.returncode == 1 and "start `lookonce up`" in done.stderr
    done = invoke(*given, "--vision", "localhost:1")
    assert done.returncode == 1 and "--vision and --lm go together" in done.stderr
    monkeypatch.setitem(sys.modules, "ray", None)  # as if not installed
    done = invoke(*given, "--vision", "localhost:1", "--lm", "localhost:1", "--ray", "auto")
    assert done.returncode == 1 and "pip install 'lookonce[ray]'" in done.stderr
    done = invoke("moderate", images.folder, "--out", tmp_path / "o.parquet")
    assert done.returncode == 2 and "--policy" in done.stderr
