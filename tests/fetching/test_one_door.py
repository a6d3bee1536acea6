"""Nothing else in the project fetches: whoever imports an HTTP client or opens connections is on a list."""

from __future__ import annotations

import ast

import httpx2

from tests.test_architecture import PACKAGES, ROOT, imported, sources

CLIENTS = {
    "aiohttp", "ftplib", "h11", "h2", "http.client", "httpcore", "httpcore2", "httplib2", "httpx", "httpx2", "niquests",
    "pycurl", "requests", "smtplib", "telnetlib", "tornado", "treq", "urllib.request", "urllib3", "websockets", "wget",
}  # fmt: skip
OPENERS = {
    "create_connection", "open_connection", "create_datagram_endpoint", "connect_tcp", "sock_connect", "connect_ex",
    "urlopen",
}  # fmt: skip
FETCHING = "lookonce/core/http_fetch/"
TALK_TO_THE_GATEWAY_ALONE = ("lookonce/cli/", "lookonce/client/", "lookonce/client.py")
"""Programs of the person in front of them: the addresses are that person's own, not a stranger's."""
REDIS_READER = "lookonce/core/stores/redis_reader.py"
"""Connects to the store that the operator configured, never to an address from a request."""

HUB = "lookonce/models/checkpoint/hub.py"
"""Names what the hub's own library raises; it has no client."""


def clients(tree: ast.AST) -> set[str]:
    """HTTP clients that are imported, and calls that open connections."""
    names = {name for name in imported(tree) for client in CLIENTS if name == client or name.startswith(client + ".")}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("urllib", "http"):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} & CLIENTS
        if isinstance(node, ast.Attribute) and node.attr in OPENERS:
            names.add(node.attr)
        if isinstance(node, ast.Constant) and node.value in CLIENTS - {"requests", "h2", "wget"}:
            names.add(node.value)  # import_module("httpx2")
    return names


def test_one_place_fetches():
    found = {}
    for package in PACKAGES:
        for path in sources(package):
            name = str(path.relative_to(ROOT))
            if not name.startswith((FETCHING, REDIS_READER, HUB, *TALK_TO_THE_GATEWAY_ALONE)):
                found |= {name: names} if (names := clients(ast.parse(path.read_text()))) else {}
    assert found == {}


def test_the_hub_s_module_takes_nothing_but_errors_from_the_client_library():
    tree = ast.parse((ROOT / HUB).read_text())
    assert clients(tree) == {"httpx2"}
    taken = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "httpx2"
    }
    assert taken and all(issubclass(getattr(httpx2, name), Exception) for name in taken)


def test_only_one_module_of_it_connects():
    connecting = {
        path.name
        for path in sources("lookonce/core/http_fetch")
        if "connect_tcp" in clients(ast.parse(path.read_text()))
    }
    assert connecting == {"pinned_connection.py"}


def test_the_rule_sees_planted_faults():
    for code in (
        "import httpx2", "from httpx2 import get", "import urllib.request", "from urllib import request",
        "from http import client", "def f():\n    import requests", "import http.client as c",
        "asyncio.open_connection(1, 2)",

        "importlib.import_module('aiohttp')", "socket.create_connection(x)", "import urllib3.util",
    ):  # fmt: skip
        assert clients(ast.parse(code)), code
    assert not clients(ast.parse("from urllib.parse import urlsplit\nimport http"))
