"""What request bodies have in common: strict models, and unions that tell their members apart by looking, so that an
error speaks of the member that was meant.

Tags of members are in parentheses: pydantic puts them into the location of an error; gateway.http.field_errors leaves
them out again.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Discriminator, GetCoreSchemaHandler
from pydantic_core import CoreSchema

UNKNOWN = "unknown "
"""Begins the type of the error about a string that no member has; the field's name follows."""
MEMBER = "member"
"""The type of an error whose context holds a `text` that follows the field's name."""


def _fail_fast(schema: Any) -> None:
    """An error takes far longer to make than an item to send: lists end at their first one."""
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            schema["fail_fast"] = True
        for part in schema.values():
            _fail_fast(part)
    elif isinstance(schema, list | tuple):
        for part in schema:
            _fail_fast(part)


class Body(BaseModel):
    """Base of request bodies: exact types, no unknown fields; a list's first fault is told."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _fail_fast(schema)
        return schema


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
    return Discriminator(tag, custom_error_type=f"{UNKNOWN}{name}", custom_error_message=f"must be {listed}: {others}")
