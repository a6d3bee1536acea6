"""`lookonce report`: one file, nothing loaded, nothing of the results taken for markup (tests/browser opens it)."""

from __future__ import annotations

import json
import re

import pytest

from lookonce.moderation.report.collect import collect
from tests.cli.commands import invoke, lookonce
from tests.moderate.results import begin_results, write_results


def content(page: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found
    return json.loads(found[1])


def test_the_page_holds_everything_and_loads_nothing(tmp_path):
    results = write_results(tmp_path)
    done = invoke("report", results)
    assert done.returncode == 0 and "41 images" in done.stdout, done.stderr
    page = (tmp_path / "results.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:|//|/)""", page) and "@import" not in page
    assert "default-src 'none'" in page and "unsafe-inline" not in page
    shown = content(page)
    assert shown["rows"] == 41 and shown["duplicates"] == 1
    assert shown["errors"][0]["kind"] == "image_invalid" and shown["errors"][0]["count"] == 1
    (spoon, fork) = shown["rules"]
    assert (spoon["asked"], sum(spoon["bins"])) == (40, 40)
    assert spoon["fired"] == sum(spoon["bins"][500:]) == 20
    assert fork["fired"] == sum(fork["bins"][800:])
    flagged = [card for card in shown["gallery"] if card["scores"][0] >= 0.5]
    assert all(card["image"].startswith("data:image/jpeg;base64,") for card in flagged)
    assert flagged[0]["follow_ups"] == {"spoon": "a <i>silver</i> spoon"}
    assert shown["repeated"] == [[str(tmp_path / "images/000.png"), 1]]


@pytest.mark.parametrize("rows", [7, 25])  # of parts of ten
def test_what_a_killed_run_knows_is_reported(tmp_path, rows):
    results = begin_results(tmp_path, rows, part_rows=10)
    assert len(list(tmp_path.glob("results.parquet.run/parts/*"))) == rows // 10
    done = invoke("report", results)
    assert done.returncode == 0 and f"{rows} images so far" in done.stdout, done.stdout + done.stderr
    shown = content((tmp_path / "results.html").read_text())
    assert (shown["rows"], shown["complete"]) == (rows, False)
    assert sum(rule["asked"] for rule in shown["rules"]) == 2 * (rows - 1)  # one of them is broken
    flagged = [card for card in shown["gallery"] if card["scores"][0] >= 0.5]
    assert len(flagged) > rows // 10 and all(card["image"] for card in flagged)


@pytest.mark.parametrize("name", ["results.jsonl", "results.csv"])
def test_every_form_of_results_gives_the_same_page(tmp_path, name):
    shown = []
    for form in ("results.parquet", name):
        (tmp_path / form).mkdir()
        page = tmp_path / f"{form}.html"
        done = invoke("report", write_results(tmp_path / form, name=form), "--out", page)
        assert done.returncode == 0, done.stderr
        shown.append(json.dumps(content(page.read_text())).replace(str(tmp_path / form), ""))
    assert shown[0] == shown[1]


def test_images_that_are_not_fetched_are_left_out_and_leave_stdout_alone(tmp_path):
    results = write_results(tmp_path, name="results.jsonl")
    (tmp_path / "urls.txt").write_text("http://127.0.0.1:9/a.png\n" * 41)
    manifest = tmp_path / "results.jsonl.manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_bytes()) | {"source": str(tmp_path / "urls.txt")}))
    done = lookonce("report", results)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r".*results\.html: 41 images, 2\d flagged, \d+ of them in the page\n", done.stdout)
    assert not any(card["image"] for card in content((tmp_path / "results.html").read_text())["gallery"])


def test_names_and_answers_are_never_markup(tmp_path):
    results = write_results(tmp_path)
    invoke("report", results)
    page = (tmp_path / "results.html").read_text()
    assert "<img src=x" not in page and "<b>spoons" not in page and "<i>silver" not in page
    assert page.count("<script") == 2


def test_the_gallery_is_bounded_and_best_first(tmp_path):
    results = write_results(tmp_path)
    collected = collect(results, 6)
    assert 0 < len(collected.cards) <= 6
    assert max(card["score_spoon"] for card in collected.cards.values()) == 0.9
    assert not collect(results, 0).cards


def test_images_that_changed_or_went_are_left_out(tmp_path):
    results = write_results(tmp_path)
    (tmp_path / "images/009.png").write_bytes((tmp_path / "images/008.png").read_bytes())
    (tmp_path / "images/019.png").unlink()
    invoke("report", results, "--out", tmp_path / "page.html")
    cards = {
        card["source"].rpartition("/")[2]: card for card in content((tmp_path / "page.html").read_text())["gallery"]
    }
    assert cards["009.png"]["image"] is None and cards["008.png"]["image"]


def test_without_results_it_says_so(tmp_path):
    done = invoke("report", tmp_path / "none.parquet")
    assert done.returncode == 1 and "holds no results" in done.stderr
