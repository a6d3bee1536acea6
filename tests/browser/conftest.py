"""The playground of a real system in real Chromium. Every page is watched: a violation of the content security policy
or an uncaught error fails the test."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from tests.browser.chromium import chromium, find_chromium
from tests.images import photograph
from tests.system.cluster import System

PATIENCE = 120_000  # milliseconds an expectation may take on a busy machine
WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => {
  window.violations.push(`${event.violatedDirective} ${event.blockedURI} ${event.sourceFile}:${event.lineNumber}`);
});
"""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "browser: needs Chromium")


@dataclass
class Watched:
    """A page and what went wrong in it."""

    page: Page
    errors: list[str] = field(default_factory=list)
    expected: set[str] = field(default_factory=set)  # parts of console errors that the test is about

    def violations(self) -> list[str]:
        return self.page.evaluate("window.violations")

    def check(self) -> None:
        assert self.violations() == []
        unexpected = [text for text in self.errors if not any(part in text for part in self.expected)]
        assert unexpected == []


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    photograph("chelsea", (112, 84)).save(folder / "chelsea.png")
    photograph("coffee", (84, 112)).save(folder / "coffee.jpg")
    for number in range(10):  # more than fit side by side
        photograph("astronaut", (56, 56)).save(folder / f"more-{number}.png")
    return folder


@pytest.fixture(scope="module")
def system(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    model = make_random_checkpoint(tmp_path_factory.mktemp("browser") / "tiny", size="tiny")
    folder = tmp_path_factory.mktemp("browser-store")
    with System(model, folder, gateway_args=("--samples", str(samples))) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    try:
        find_chromium()
    except FileNotFoundError as error:
        pytest.fail(str(error))
    expect.set_options(timeout=PATIENCE)
    with chromium() as running:
        yield running


@pytest.fixture
def open_page(browser: Browser, system: System) -> Iterator[Callable[..., Watched]]:
    """Opens the playground in a context of its own; `options` are those of Playwright's new_context."""
    opened: list[Watched] = []

    def open_page(url: str | None = None, **options: Any) -> Watched:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 860}, **options})
        context.add_init_script(WATCH)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        watched = Watched(page)
        page.on("pageerror", lambda error: watched.errors.append(f"uncaught: {error}"))
        page.on("console", lambda message: watched.errors.append(message.text) if message.type == "error" else None)
        page.goto((url or system.gateways[0].url) + "/")
        opened.append(watched)
        return watched

    yield open_page
    try:
        for watched in opened:
            watched.check()
    finally:
        for watched in opened:
            watched.page.context.close()


@pytest.fixture
def page(open_page: Callable[..., Watched]) -> Page:
    return open_page().page


_serial = itertools.count(1)


@pytest.fixture
def image_path(tmp_path: Path) -> Path:
    """A file that no other test has."""
    number = next(_serial)
    image = Image.new("RGB", (112, 84), (number * 71 % 256, number * 31 % 256, number % 256))
    path = tmp_path / "my image.png"
    image.save(path)
    return path
