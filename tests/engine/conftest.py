"""One tiny random checkpoint for all engine tests."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from lookonce.models.qwen2_vl.architecture import SIZES
from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from tests.engine.lab import Lab


@pytest.fixture(scope="session")
def checkpoint_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("engine") / "tiny"
    if os.environ.get("LOOKONCE_TEST_ENGINE") == "vllm":  # it has no kernel for heads of 16 on CPUs
        return make_random_checkpoint(path, sizes={"tiny": replace(SIZES["tiny"], heads=2, kv_heads=1)}, size="tiny")
    return make_random_checkpoint(path, size="tiny")


@pytest.fixture(scope="session")
def lab(checkpoint_path):
    return Lab(checkpoint_path)
