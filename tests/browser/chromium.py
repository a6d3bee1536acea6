"""Chromium, driven by Playwright: the system's own, since Playwright's download is not wanted on build machines."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-proxy-server",
)
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_chromium() -> str:
    """Its path: $CHROMIUM, else what is installed. Raises FileNotFoundError with the remedy."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None or not os.access(found, os.X_OK):
        raise FileNotFoundError(
            "the browser tests need Chromium: apt-get install chromium, or set CHROMIUM to its path"
        )
    return found


@contextmanager
def chromium() -> Iterator[Browser]:
    """A running browser."""
    path = find_chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(FLAGS), timeout=180_000)
        try:
            yield browser
        finally:
            browser.close()
