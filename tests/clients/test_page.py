"""docs/compatibility.md is of the clients that are driven, at the versions that are."""

from __future__ import annotations

import pytest

from tests.clients.page import PAGE, version_of
from tests.clients.test_clients import OFTEN

TYPED = ("instructor", "pydantic_ai", "openai_agents", "llm", "typesafe", "anthropic", "ollama")


@pytest.mark.parametrize("client", [*OFTEN, *TYPED])
def test_the_page_is_of_this_version(client: str) -> None:
    assert f"| {version_of(client)} |" in PAGE.read_text(), "make test-clients, then python -m tests.clients.page"
