"""Query parameters of lists, and lists as the API shows them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from starlette.requests import Request

from gateway.http.field_errors import UnknownField
from lookonce.core.errors import invalid


def check_names(request: Request, known: Collection[str]) -> None:
    """Raise INVALID_ARGUMENT for a query parameter nobody knows."""
    unknown = next((name for name in request.query_params if name not in known), None)
    if unknown is not None:
        raise UnknownField(f"unknown query parameter '{unknown[:100]}'", unknown[:100])


def limit_of(request: Request, *, default: int, most: int) -> int:
    """The query's `limit`. Raises INVALID_ARGUMENT."""
    text = request.query_params.get("limit")
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and 1 <= int(text) <= most):
        raise invalid(f"'limit' must be a whole number from 1 to {most}", param="limit")
    return int(text)


def list_object(items: Sequence[dict[str, Any]], *, more: bool) -> dict[str, Any]:
    """OpenAI's list object."""
    first, last = (items[0]["id"], items[-1]["id"]) if items else (None, None)
    return {"object": "list", "data": list(items), "first_id": first, "last_id": last, "has_more": more}
