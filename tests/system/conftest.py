"""Systems that several modules share: each test leaves them whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from tests.system.cluster import System
from tests.valkey import PATIENT, ValkeyServer


@pytest.fixture(scope="package")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_checkpoint(tmp_path_factory.mktemp("shared") / "model", max_pixels=200 * 28 * 28)


@pytest.fixture(scope="package")
def single(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """One service of each kind on an embedded store."""
    with System(model, tmp_path_factory.mktemp("single")) as running:
        yield running


@pytest.fixture(scope="package")
def valkey() -> Iterator[ValkeyServer]:
    """The Redis of `double`."""
    with ValkeyServer() as server:
        yield server


@pytest.fixture(scope="package")
def double(model: Path, valkey: ValkeyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Two services of each kind on one Redis."""
    store = f"{valkey.url}?{PATIENT}"
    many = ("--max-concurrency", "200")
    folder = tmp_path_factory.mktemp("double")
    with System(model, folder, visions=2, languages=2, gateways=2, store=store, gateway_args=many) as running:
        yield running
