"""How the suite is spread over workers: tests that share a running system stay together, the longest first."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

# The same cases every time, however slow the machine is; what was found on another day is not remembered.
settings.register_profile(
    "suite", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")

SHARE_A_SYSTEM = ("gateway", "client", "cli", "lm", "vision", "browser", "stores", "engine", "training", "checkpoint")
LONGEST_FIRST = ("system", "gateway", "cli", "client", "lm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group by module, or by folder where its tests share one system; then start the longest groups first."""
    for item in items:
        folder, module = item.path.parent.name, item.path.stem
        if item.get_closest_marker("xdist_group") is None and folder in SHARE_A_SYSTEM:
            group = folder if folder in ("gateway", "client", "cli") else f"{folder}/{module}"
            item.add_marker(pytest.mark.xdist_group(group))

    def place(item: pytest.Item) -> int:
        folder = item.path.parent.name
        return LONGEST_FIRST.index(folder) if folder in LONGEST_FIRST else len(LONGEST_FIRST)

    items.sort(key=place)
