"""Random checkpoints of true architecture, made once per run, and a digest memory of the run's own."""

from pathlib import Path

import pytest

from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint


@pytest.fixture(autouse=True)
def digest_memory(tmp_path_factory, monkeypatch) -> Path:
    path = tmp_path_factory.getbasetemp() / "lookonce-cache"
    monkeypatch.setenv("LOOKONCE_CACHE_DIR", str(path))
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """Published layout, tied head, one file. Read-only: tests that damage a checkpoint make their own."""
    return make_random_checkpoint(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def sharded(tmp_path_factory) -> Path:
    """Nested layout, untied head, four shards of which some hold one half only. Read-only."""
    path = tmp_path_factory.mktemp("sharded") / "model"
    return make_random_checkpoint(path, layout="nested", tied=False, shards=4, vocab=2048)
