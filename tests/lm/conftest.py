"""One random checkpoint of true architecture a session, its unsplit twin, and embeddings made by its own tower."""

from __future__ import annotations

import pytest

from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from tests.lm.split import Tower
from tests.unsplit import Unsplit


@pytest.fixture(scope="session")
def checkpoint_path(tmp_path_factory):
    return make_random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture(scope="session")
def unsplit(checkpoint_path):
    return Unsplit(checkpoint_path)


@pytest.fixture(scope="session")
def tower(checkpoint_path):
    return Tower(checkpoint_path)
