"""How the playground's files are served: policy, caching, no key, no way out of the folder. Needs no browser."""

from __future__ import annotations

import re

import pytest

from gateway.http.playground import PAGES, make_router
from lookonce.core.errors import LookonceError
from tests.gateway.processes import GatewayProcess

NOWHERE = ("--vision", "127.0.0.1:1", "--lm", "127.0.0.1:1")


@pytest.fixture(scope="module")
def http():
    env = {"LOOKONCE_GATEWAY_API_KEYS": "a-key-of-tests-0123456789"}
    with GatewayProcess(*NOWHERE, env=env) as gateway, gateway.client() as client:
        yield client


def test_the_page_and_its_files_need_no_key_and_the_api_does(http):
    page = http.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    wanted = set(re.findall(r'(?:href|src)="(playground/[^"]+)"', page.text))
    assert {"playground/app.js", "playground/app.css", "playground/base.css", "playground/icon.svg"} <= wanted
    for path in wanted | {f"playground/{file.name}" for file in PAGES.glob("*.js")}:
        assert http.get(f"/{path}").status_code == 200, path
    assert http.get("/v1/models").status_code == 401
    assert http.get("/playgroundx").status_code == 401


def test_every_file_carries_the_policy(http):
    for path in ("/", "/playground/app.js", "/playground/samples/index.json", "/playground/icon.svg"):
        headers = http.get(path).headers
        rules = dict(rule.strip().split(" ", 1) for rule in headers["content-security-policy"].split(";"))
        assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == rules["frame-ancestors"] == "'none'"
        assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"


def test_nothing_is_inline():
    page = (PAGES / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*src=)|javascript:", page)
    for file in PAGES.glob("*.js"):
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|https?://(?!www\.w3)", file.read_text()
        )


def test_a_known_file_is_not_sent_again(http):
    first = http.get("/playground/app.js")
    again = http.get("/playground/app.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert http.head("/").headers["etag"] == http.get("/").headers["etag"]
    assert first.headers["etag"] != http.get("/").headers["etag"]


@pytest.mark.parametrize(
    "path",
    [
        "/playground/",
        "/playground/absent.js",
        "/playground/%2e%2e/__init__.py",
        "/playground/..%2f..%2fserver.py",
        "/playground/index.html",
        "/playground//etc/passwd",
        "/playground/samples/",
    ],
)
def test_nothing_else_is_served(http, path):
    reply = http.get(path)
    assert reply.status_code == 404
    assert reply.json()["error"]["code"] == "not_found"
    assert http.post("/").status_code == 405


def test_it_can_be_left_out():
    with GatewayProcess(*NOWHERE, "--no-playground") as gateway, gateway.client() as client:
        assert client.get("/healthz").status_code == 200
        assert [client.get(path).status_code for path in ("/", "/playground/app.js")] == [404, 404]


def test_samples_are_read_at_start_or_refused(tmp_path):
    make_router(tmp_path)
    with pytest.raises(LookonceError, match="does not exist"):
        make_router(tmp_path / "absent")
    (tmp_path / "samples.json").write_text('{"samples": [{"file": "gone.png", "questions": [["?", "!"]]}]}')
    with pytest.raises(LookonceError, match="cannot be read"):
        make_router(tmp_path)
