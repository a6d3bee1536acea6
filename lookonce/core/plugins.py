"""What is chosen by name: built in, or else an entry point of an installed package. Imported when it is chosen."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

_log = logging.getLogger(__name__)


def load(group: str, name: str, builtin: Mapping[str, str]) -> Any | None:
    """The object called `name`: of `builtin` ("module:attribute"), else of the entry points of `group`, else None.

    What an installed package raises on import is raised here.
    """
    if name in builtin:
        return EntryPoint(name, builtin[name], group).load()
    found = tuple(entry_points(group=group, name=name))
    if not found:
        return None
    if len({point.value for point in found}) > 1:
        _log.warning("%s %r is installed several times: %s", group, name, ", ".join(point.value for point in found))
    return found[0].load()


def names(group: str, builtin: Mapping[str, str]) -> list[str]:
    """Every name that `load` knows, sorted; nothing is imported."""
    return sorted({*builtin, *(point.name for point in entry_points(group=group))})
