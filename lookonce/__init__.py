"""Split serving for vision-language models: the leaf that every process shares, the client and the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lookonce.core.errors import LookonceError

if TYPE_CHECKING:
    from lookonce.client import AsyncClient, Client, Question

__all__ = ["AsyncClient", "Client", "LookonceError", "Question", "__version__"]
__version__ = "0.2.0"
_OF_THE_CLIENT = frozenset({"AsyncClient", "Client", "Question"})


def __getattr__(name: str) -> Any:
    """The client, imported when first asked for: services import this package too, and need none."""
    if name in _OF_THE_CLIENT:
        from lookonce import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
