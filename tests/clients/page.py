"""docs/compatibility.md, of what drives printed when `make test-clients` ran them: `python -m tests.clients.page`."""

from __future__ import annotations

import json
import re

from tests.clients.environments import HERE, KEPT
from tests.processes import ROOT

RESULTS = KEPT / "results"
PAGE = ROOT / "docs" / "compatibility.md"
HEAD = """# Clients that were driven

Other people's clients with their defaults against `lookonce up` and the bundled model: one image as data, by URL and
by our id, whole and streamed, a second turn, and what else each offers. `make test-clients` installs each into an
environment of its own, runs it, and ends at the first wrong answer. `python -m tests.clients.page` made this page of
what was right. The model is small: an answer of a given form is valid whatever it knows, its content is not judged.

| client | what was asked and right |
|---|---|
"""


def keep(client: str, printed: str) -> None:
    """Keep what a drive printed: a line for each thing that was right."""
    names = [line.partition(": ")[0] for line in printed.splitlines() if ": " in line and not line.startswith(" ")]
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{client.replace(':', '-')}.json").write_text(json.dumps({"client": client, "right": names}))


def version_of(client: str) -> str:
    """The client's packages and their versions, as they are installed for it."""
    if client.startswith("node:"):
        wanted = json.loads((HERE / "node" / "package.json").read_text())["dependencies"]
        own = {"openai": ("openai",), "ai_sdk": ("ai", "@ai-sdk/openai", "@ai-sdk/openai-compatible")}
        return ", ".join(f"{name} {wanted[name]}" for name in own[client.removeprefix("node:")])
    file = HERE / "requirements" / f"{client}.txt"
    if not file.is_file():
        return re.search(r"^openai==.*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[0].replace("==", " ")
    return file.read_text().splitlines()[0].replace("==", " ")


def page() -> str:
    """Of all results that are kept."""
    found = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))]
    rows = [f"| {version_of(one['client'])} | {'; '.join(one['right'])} |" for one in found]
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
