"""The page of `lookonce report` in real Chromium, from the disk: the content security policy watched, no network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import PATIENCE, WATCH, Watched
from tests.cli.commands import lookonce
from tests.moderate.results import write_results

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    done = lookonce("report", str(write_results(folder)), "--out", str(folder / "page.html"), "--gallery", "60")
    assert done.returncode == 0, done.stderr
    return folder / "page.html"


@pytest.fixture(params=["light", "dark"])
def page(request: pytest.FixtureRequest, browser: Browser, report: Path) -> Iterator[Page]:
    context = browser.new_context(color_scheme=request.param, viewport={"width": 1100, "height": 900})
    context.add_init_script(WATCH)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    watched, asked = Watched(page), []
    page.on("pageerror", lambda error: watched.errors.append(f"uncaught: {error}"))
    page.on("console", lambda message: watched.errors.append(message.text) if message.type == "error" else None)
    page.on("request", lambda sent: asked.append(sent.url))
    page.goto(report.as_uri())
    yield page
    try:
        watched.check()
        assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    finally:
        context.close()


def test_thresholds_move_counts_and_gallery(page: Page) -> None:
    expect(page.get_by_role("heading", level=1)).to_have_text("<b>spoons</b> & forks")
    count = page.locator(".rule", has_text="Is there a spoon?").locator(".count strong")
    expect(count).to_have_text("20")
    page.get_by_label("Flagged by").select_option("spoon")
    before = page.locator("#gallery figure").count()
    assert before == 20
    page.get_by_label("Threshold of spoon").fill("0.85")
    expect(count).to_have_text("4")
    expect(page.locator("#gallery figure")).to_have_count(4)
    page.get_by_role("button", name="Thresholds of the policy").click()
    expect(count).to_have_text("20")
    expect(page.locator("#gallery figure")).to_have_count(before)


def test_it_shows_images_errors_and_duplicates_as_text(page: Page) -> None:
    expect(page.locator("#gallery img").first).to_be_visible()
    assert page.locator("#gallery img").first.evaluate("image => image.complete && image.naturalWidth") > 0
    expect(page.locator("#errors")).to_contain_text("image_invalid")
    expect(page.locator("#repeated")).to_contain_text("000.png")
    expect(page.locator("#gallery")).to_contain_text("a <i>silver</i> spoon")
    assert page.evaluate("window.hacked") is None
    light = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(20, 23, 26)" if light else "rgb(255, 255, 255)")
