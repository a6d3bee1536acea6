"""Unions that tell their members apart by looking, so that an error speaks of the member that was meant.

Tags are in parentheses: pydantic puts them into the location of an error; gateway.http.body leaves them out again.
"""

from __future__ import annotations

from typing import Any

from pydantic import Discriminator

UNKNOWN = "unknown "
"""Begins the type of the error about a string that no member has; the field's name follows."""


def text_or_list(value: Any) -> str:
    """For `str | list[...]`: which of the two is meant."""
    return "(list)" if isinstance(value, list) else "(text)"


def text_or_object(value: Any) -> str:
    """For `str | Model`."""
    return "(text)" if isinstance(value, str) else "(object)"


def by_field(name: str, *known: str, others: str) -> Discriminator:
    """For models told apart by the string in one field, tagged with the known strings. `others` says what becomes of
    other strings: "... are not supported"."""

    def tag(value: Any) -> str | None:
        found = value.get(name) if isinstance(value, dict) else None
        return f"({found})" if found in known else None

    listed = ", ".join(f"'{item}'" for item in known[:-1]) + f" or '{known[-1]}'"
    return Discriminator(
        tag,
        custom_error_type=f"{UNKNOWN}{name}",
        custom_error_message=f"must be {listed}: {others}",
    )
