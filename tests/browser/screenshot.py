"""Takes the screenshot of the playground that the docs show: `python -m tests.browser.screenshot docs/playground.png`.

Starts a whole system with the bundled checkpoint and its samples (or `--model` and `--samples`), asks, and saves what
Chromium shows."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from playwright.sync_api import Page

from tests.browser.chromium import chromium
from tests.processes import ROOT
from tests.system.cluster import System

BUNDLED = ROOT / "lookonce" / "data"
PATIENCE = 120_000  # milliseconds


def take(page: Page, url: str, args: argparse.Namespace) -> None:
    """Three kinds of answers on one sample."""
    page.goto(f"{url}/")
    page.locator("#sample-list button").nth(args.sample).click()
    page.locator("#facts").wait_for()
    page.get_by_role("tab", name="Ask many").click()
    page.get_by_role("button", name="Ask all").click()
    page.locator("#tally", has_text=" in ").wait_for()
    if args.score:
        question, *choices = args.score
        page.get_by_role("tab", name="Score").click()
        page.locator("#score-question").fill(question)
        page.locator("#choices").fill(", ".join(choices))
        page.get_by_role("button", name="Score", exact=True).click()
        page.locator(".choice").first.wait_for()
    page.get_by_role("tab", name="Ask", exact=True).click()
    page.locator("#question").fill(args.question)
    page.keyboard.press("Enter")
    page.locator(".answer:first-child .badges").wait_for()
    page.locator("#question").blur()
    page.evaluate("scrollTo(0, 0)")
    page.screenshot(path=args.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="PNG to write")
    parser.add_argument("--model", type=Path, default=BUNDLED / "shapes", help="checkpoint")
    parser.add_argument("--samples", type=Path, default=BUNDLED / "samples", help="folder of images")
    parser.add_argument("--sample", type=int, default=5, help="number of the image")
    parser.add_argument("--question", default="How many triangles are there?")
    parser.add_argument("--score", nargs="+", default=["How many shapes are there?", "2", "3", "4", "5"])
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--width", type=int, default=1200)
    parser.add_argument("--height", type=int, default=900)
    args = parser.parse_args()
    size = {"width": args.width, "height": args.height}
    with (
        tempfile.TemporaryDirectory(prefix="lookonce-screenshot-") as folder,
        System(args.model, Path(folder), gateway_args=("--samples", str(args.samples))) as system,
        chromium() as browser,
    ):
        page = browser.new_page(viewport=size, color_scheme="dark" if args.dark else "light")
        page.set_default_timeout(PATIENCE)
        take(page, system.gateways[0].url, args)


if __name__ == "__main__":
    main()
