"""Unions that tell their members apart by looking, so that an error speaks of the member that was meant.

Tags are in parentheses: pydantic puts them into the location of an error, and no field is called that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def text_or_list(value: Any) -> str:
    """For `str | list[...]`: which of the two is meant."""
    return "(list)" if isinstance(value, list) else "(text)"


def text_or_object(value: Any) -> str:
    """For `str | Model`."""
    return "(text)" if isinstance(value, str) else "(object)"


def by_field(name: str) -> Callable[[Any], str | None]:
    """For models told apart by the string in one field."""

    def tag(value: Any) -> str | None:
        found = value.get(name) if isinstance(value, dict) else None
        return f"({found[:40]})" if isinstance(found, str) else None

    return tag
