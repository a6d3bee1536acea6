"""One tiny random checkpoint for all engine tests."""

from __future__ import annotations

import pytest

from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from tests.engine.lab import Lab


@pytest.fixture(scope="session")
def checkpoint_path(tmp_path_factory):
    return make_random_checkpoint(tmp_path_factory.mktemp("engine") / "tiny", size="tiny")


@pytest.fixture(scope="session")
def lab(checkpoint_path):
    return Lab(checkpoint_path)
