"""Split serving for vision-language models: `core`, `models`, `moderation`, the client and the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lookonce.core.errors import LookonceError
from lookonce.core.version import __version__

if TYPE_CHECKING:
    from lookonce.client import AsyncClient, Client, Question

__all__ = ["AsyncClient", "Client", "LookonceError", "Question", "__version__"]
_OF_THE_CLIENT = frozenset({"AsyncClient", "Client", "Question"})


def __getattr__(name: str) -> Any:
    """The client, imported when first asked for: services import this package too, and need none."""
    if name in _OF_THE_CLIENT:
        from lookonce import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
