"""How the suite is spread over workers: tests that share a running system stay together, the longest first."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

# The same cases every time, however slow the machine is; what was found on another day is not remembered.
settings.register_profile(
    "suite", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")

SHARED = ("gateway", "client", "cli", "moderate")
"""Folders whose tests share one system. In other folders the tests of a module stay together."""
APART = ("cli/test_up.py",)
ONE_SYSTEM = ("system/test_erasure.py", "system/test_faults.py", "system/test_once.py", "system/test_parity.py")
"""Modules that share the systems of tests/system/conftest.py."""
ONE_BY_ONE = ("", "fetching")
LONGEST_FIRST = ("gateway", ONE_SYSTEM[0], "moderate", "cli/test_up.py", "system", "client", "cli", "lm")


def group_of(nodeid: str) -> str:
    """The tests of a group run in one worker, in the order they stand in."""
    path = nodeid.partition("::")[0].removeprefix("tests/")
    folder = path.rpartition("/")[0]
    if folder in ONE_BY_ONE:
        return nodeid
    if path in ONE_SYSTEM:
        return ONE_SYSTEM[0]
    return folder if folder in SHARED and path not in APART else path


class Groups(LoadScopeScheduling):
    """Gives whole groups to workers. (The mark xdist_group has no effect since pytest 9.2.)"""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Groups:
    config.option.loadscopereorder = False  # leave them in the order of `pytest_collection_modifyitems`
    return Groups(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest groups first."""

    def place(item: pytest.Item) -> int:
        group = group_of(item.nodeid)
        return next((at for at, name in enumerate(LONGEST_FIRST) if group.startswith(name)), len(LONGEST_FIRST))

    items.sort(key=place)


@pytest.fixture(scope="module", autouse=True)
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Fail when a group is spread over workers: each would start the group's system anew."""
    worker, group = os.environ.get("PYTEST_XDIST_WORKER"), group_of(request.node.nodeid)
    if worker is not None and group != request.node.nodeid:
        mark: Path = tmp_path_factory.getbasetemp().parent / group.replace("/", "-")
        try:
            with mark.open("x") as file:
                file.write(worker)
        except FileExistsError:
            assert mark.read_text() == worker, f"{group} runs in two workers"


@pytest.fixture(autouse=True)
def logs_of_its_own() -> Iterator[None]:
    """A command that runs in this process sends its logs to stderr; those of the next test go to stdout again."""
    yield
    if structlog.is_configured():
        structlog.reset_defaults()
        structlog.contextvars.clear_contextvars()
